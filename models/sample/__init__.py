"""The sample model: a small trained Qwen3-VL-MoE that ships, and everything that made it.

In reading order: `words`, `font`, `drawing` (the world), `text_tasks`, `generator` (questions with true
answers), `tokenizer`, `packing` (batches), `forward`, `schedule`, `optimizer`, `fast_ops`, `team`, `train`
(the run), `evaluate` (held-out accuracy), `files`, `demo` (what ships). `checkpoint/README.md` is the model
card.
"""
