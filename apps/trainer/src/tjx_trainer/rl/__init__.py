"""Reinforcement learning and preference optimization: the tasks grpo and dpo."""
