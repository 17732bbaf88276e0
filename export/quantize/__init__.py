"""Integer weights: which parameters, in which format, by which method.

Reading order: ``recipe`` (what becomes what), ``rounding`` and ``gptq`` (the methods), ``calibration`` and ``walk``
(prompts on their way through the layers), ``quantizer`` (carries a recipe out, unit by unit, into a ``store``),
``stored`` (the tensors of the bundle), ``as_stored`` (reads them back). ``--weights mixed`` adds ``sensitivity``,
``allocation``, ``bit_search`` and ``report``. ``work`` is what the exporter sees of all this.
"""
