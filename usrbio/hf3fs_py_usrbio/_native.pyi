# The cffi module of native/ffi/build_hf3fs.py. C data is Any: cffi checks it when it runs.
from typing import Any

ffi: Any
lib: Any
