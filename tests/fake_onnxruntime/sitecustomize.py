"""Python imports this at its start if the folder is in PYTHONPATH: the stand-in, for processes that tests do not write.

FAKE_ORT=1 asks for it.
"""

import os

if os.environ.get("FAKE_ORT") == "1":
    import fake_ort_cuda

    fake_ort_cuda.install()
