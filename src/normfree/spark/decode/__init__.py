"""Decode of Spark layers that reads only what is active: rows of an FFN, tokens of a KV cache."""

from normfree.spark.decode.backends import BACKENDS, decode_backends
from normfree.spark.decode.shapes import PackedFeedForward
from normfree.spark.decode.sparse_layers import pack_feed_forward, sparse_attention_decode, sparse_feed_forward

__all__ = [
    "BACKENDS",
    "PackedFeedForward",
    "decode_backends",
    "pack_feed_forward",
    "sparse_attention_decode",
    "sparse_feed_forward",
]
