# pyright: basic, reportMissingImports=false
"""What SGLang 0.5.23 needs to run on a machine without a GPU; on PYTHONPATH, so that its worker processes have it too.

Its storage code, its cache and its controllers run as released. Replaced is only what needs CUDA:
1. torchvision, whose wheels need libtorch_cuda, is imported for image models that are not used here: an empty one;
2. vllm._custom_ops.rotary_embedding, SGLang's choice for a device without kernels of its own: the same in torch;
3. the host pool's page locking (there is no CUDA runtime to lock for) and its copies between device and host (operators of
   the CUDA-only sgl_kernel): plain memory and torch indexing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any


class _Nothing:
    """Any attribute, but no call: nothing here may use it."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("torchvision is not here")


class _EmptyModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


def _rotary_embedding(positions: Any, query: Any, key: Any, head_size: int, cache: Any, is_neox: bool) -> None:
    """In place: each head's first dimensions turned by the angles of its position."""
    import torch

    cosine, sine = (part[:, None].float() for part in cache[positions].chunk(2, dim=-1))
    turned = cosine.shape[-1] * 2
    for states in (query, key):
        if states is None:
            continue
        heads = states.view(positions.numel(), -1, head_size)[..., :turned]
        whole = heads.float()
        first, second = whole.chunk(2, -1) if is_neox else (whole[..., ::2], whole[..., 1::2])
        pair = (first * cosine - second * sine, second * cosine + first * sine)
        heads.copy_(torch.cat(pair, -1) if is_neox else torch.stack(pair, -1).flatten(-2))


def _without_page_locking(module: Any) -> None:
    module._cuda_host_register = lambda *_, **__: None


def _with_torch_copies(module: Any) -> None:
    pool = module.MHATokenToKVPoolHost
    made = pool.__init__

    def make(self: Any, *given: Any, **named: Any) -> None:
        named["pin_memory"] = False
        made(self, *given, **named)

    def place(self: Any, host: Any) -> tuple[Any, ...]:
        at = host.cpu().long()
        return (at // self.page_size, at % self.page_size) if self.layout == "page_first_direct" else (at,)

    def backup(self: Any, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str) -> None:
        host, device = place(self, host_indices), device_indices.cpu().long()
        for layer in range(self.layer_num):
            self.k_data_refs[layer][host] = self.device_k_buffers[layer][device]
            self.v_data_refs[layer][host] = self.device_v_buffers[layer][device]

    def load(
        self: Any,
        device_pool: Any,
        host_indices: Any,
        device_indices: Any,
        layer_id: int,
        io_backend: str,
        *,
        is_draft: bool = False,
    ) -> None:
        if not is_draft and not 0 <= layer_id < self.target_layer_num:
            return
        host, device = place(self, host_indices), device_indices.cpu().long()
        self.device_k_buffers[layer_id][device] = self.k_data_refs[layer_id][host]
        self.device_v_buffers[layer_id][device] = self.v_data_refs[layer_id][host]

    pool.__init__ = make
    pool.backup_from_device_all_layer = backup
    pool.load_to_device_per_layer = load


PATCHES: dict[str, Callable[[Any], None]] = {
    "sglang.srt.mem_cache.pool_host.common": _without_page_locking,
    "sglang.srt.mem_cache.pool_host.mha": _with_torch_copies,
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] == "torchvision" or fullname in ("vllm", "vllm._custom_ops"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        patch = PATCHES.pop(fullname, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def patched(module: types.ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = patched  # type: ignore[method-assign]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name) if spec.name.startswith("vllm") else _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "vllm._custom_ops":
            module.__dict__["rotary_embedding"] = _rotary_embedding
        elif module.__name__ == "torchvision":
            module.__dict__["__version__"] = "0.28.0"


sys.meta_path.insert(0, _Finder())
