"""Encoding and language in processes of their own, with DeepStack sent between them.

Reading order: ``messages`` and ``states`` (the protocol), ``buffers``, ``blocks`` and ``pool`` (what is sent, and from
where to where), ``transport`` (how bytes move), ``channel`` (control connection), ``conn_multimodal`` (a transfer, from
both sides), ``multimodal_embedding`` (the encode process), ``encoders``, ``reception``, ``decoding`` and
``multimodal_language`` (the language process).
"""
