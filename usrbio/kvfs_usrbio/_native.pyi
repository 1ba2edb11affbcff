# The cffi module of native/ffi/build_usrbio.py. C data is Any: cffi checks it when it runs.
from typing import Any

ffi: Any
lib: Any
