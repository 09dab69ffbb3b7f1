"""Names of recorded values and of columns that several modules use, with their units.

What a single study and its report use is named there.
"""

from __future__ import annotations

# layers.parquet, of a head
ENTROPY_NATS = "entropy_nats"
"""Attention entropy, nats; mean over queries."""
ENTROPY_THRESHOLD_NATS = "entropy_threshold_nats"
"""What entropy regularization pulls a head's entropy towards, nats."""

# layers.parquet, of a layer
SCORES_NAN_COUNT = "scores_nan_count"
SCORES_INF_COUNT = "scores_inf_count"
"""Attention scores that are NaN, or infinite."""
RESIDUAL_RMS = "residual_rms"
"""Root mean square of the residual stream after the block, in units of its entries."""
RESIDUAL_KURTOSIS = "residual_kurtosis"
"""Kurtosis of the channels' RMS: from 1 to the number of channels."""
RESIDUAL_EXCESS_KURTOSIS = "residual_excess_kurtosis"
"""Excess kurtosis of all entries: 0 for a normal distribution."""
RESIDUAL_MAX_OVER_MEDIAN = "residual_max_over_median"
"""Largest over median magnitude of a token's channels, mean over tokens."""
TOKEN_COSINE_SIMILARITY = "token_cosine_similarity"
"""Mean cosine between two tokens of a sequence: from -1 to 1."""
RESIDUAL_NAN_COUNT = "residual_nan_count"
RESIDUAL_INF_COUNT = "residual_inf_count"
"""Entries of the residual stream that are NaN, or infinite."""
ACTIVE_SHARE = "active_share"
"""Share of the neurons that are not zero."""
ATTENDED_KEYS = "attended_keys"
"""Keys with a weight above zero in sparse attention, mean over queries and heads."""
NEGATIVE_SLOPE = "negative_slope"
"""Learned slope of leaky ReLU for negative inputs."""

# metrics.parquet
TRAIN_LOSS = "train_loss"
"""Mean loss of the training steps since the last entry; cross-entropy in nats per token, without an objective."""
EVAL_LOSS = "eval_loss"
"""Mean cross-entropy of all predicted evaluation tokens, nats per token; also a column of results.csv."""
TOKENS_PER_SECOND = "tokens_per_second"

# results.csv, and frames made from it
EVAL_PPL = "eval_ppl"
"""Perplexity: e to the evaluation loss."""
EVAL_PPL_LOW = "eval_ppl_low"
EVAL_PPL_HIGH = "eval_ppl_high"
"""Bounds of the 95 % confidence interval over seeds."""
DELTA_PERCENT = "delta_percent"
"""Perplexity over that of the study's baseline, minus one, percent."""

# other tables
LOSS_NATS = "loss_nats"
"""Mean cross-entropy of a sequence's predicted tokens, nats per token."""
UNIFORM_NATS = "uniform_nats"
"""Entropy of uniform attention to the same visible keys, nats."""
SHARE_OF_UNIFORM = "share_of_uniform"
"""Entropy over that of uniform attention: from 0 to 1."""
SINK_SHARE = "sink_share"
"""Attention paid to the first key of a sequence: from 0 to 1."""
SINK_QUERY_SHARE = "sink_query_share"
"""Share of queries that pay more than 0.3 of their attention to the first key of a sequence: from 0 to 1."""
STANDARD_ERROR = "standard_error"
"""Of a mean over sequences, in its unit."""
