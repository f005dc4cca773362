"""Reinforcement learning and preference optimization: the tasks grpo, dpo and kto."""
