"""What a model costs, by formula: no model is built and JAX is not imported."""

from tjx_nn.config import GPTConfig


def count_params(config: GPTConfig) -> int:
    """Return the number of parameters of a GPT; the tied embedding counts once.

    Examples
    --------
    >>> count_params(GPTConfig.preset("gpt2_small"))
    124439808
    """
    tables = (config.vocab_size + config.max_seq_len) * config.d_model
    return tables + config.n_layer * _count_block(config) + _count_norm(config)


def flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Return the floating-point operations that training on one token takes, forward and backward.

    Six for each parameter that takes part in a matrix product (the tied embedding does, as the
    output head; the position table does not) and `12 * n_layer * seq_len * d_model` for attention,
    of which causal masking is not subtracted: the convention in which MFU is usually quoted
    (Chowdhery et al. 2022, "PaLM", appendix B).

    Parameters
    ----------
    config
        The model.
    seq_len
        Tokens of a sequence.

    Examples
    --------
    >>> flops_per_token(GPTConfig.preset("gpt2_small"), 1024)
    855166464
    """
    multiplied = count_params(config) - config.max_seq_len * config.d_model
    return 6 * multiplied + 12 * config.n_layer * seq_len * config.d_model


def _count_block(config: GPTConfig) -> int:
    d, kv = config.d_model, config.kv_heads * config.head_dim
    attention = _count_linear(config, d, d) * 2 + _count_linear(config, d, kv) * 2
    mlp = _count_linear(config, d, config.ff_dim) + _count_linear(config, config.ff_dim, d)
    return attention + mlp + 2 * _count_norm(config)


def _count_linear(config: GPTConfig, fan_in: int, fan_out: int) -> int:
    return fan_in * fan_out + (fan_out if config.bias else 0)


def _count_norm(config: GPTConfig) -> int:
    return config.d_model * (2 if config.bias else 1)
