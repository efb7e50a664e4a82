# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: runs in every vLLM process, possibly more than once.

On a processor with AMX it asks for the permission that vLLM's kernels need (`processor.py`), for
engines that do not prune as well. Two methods of vLLM are wrapped. Both do the same as before
unless `additional_config` has `himap`:

* `vllm.config.VllmConfig.__post_init__` (wrapped): the plugin must check and choose (scheduler,
  worker) when the configuration is complete, for every architecture, unsupported ones included.
  vLLM's per-model hook, `MODELS_CONFIG_MAP`, runs before async scheduling and worker are settled,
  and only for architectures registered in advance. Remove when: plugins get a configuration hook.
* `vllm.v1.engine.input_processor.InputProcessor.process_inputs` (wrapped): the only place in the
  API process that sees a request's parameters and the positions of its images together, before it
  goes to the engine core. vLLM's own request hook, `LogitsProcessor.validate_params`, sees no
  prompt and would put a logits processor into every sampling step. Remove when: plugins get a
  request hook.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_himap_wrapped"


def register() -> None:
    """Install the plugin in this process; repeatable.

    If the plugin does not know this vLLM's internals, it only refuses engines that ask for pruning.
    """
    from himap_vllm.processor import allow_amx
    from himap_vllm.vllm_versions import is_supported

    allow_amx()
    _wrap_config()
    if is_supported():
        _wrap_admission()


def _wrap_config() -> None:
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        from himap_vllm.frontend.support import check_and_configure

        check_and_configure(self)

    setattr(post_init, _MARK, True)
    VllmConfig.__post_init__ = post_init


def _wrap_admission() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        from vllm.exceptions import VLLMValidationError

        from himap_vllm.config import HiMAPError
        from himap_vllm.frontend.admission import admission_of

        admission = admission_of(self)
        if admission is not None:
            try:
                admission.admit(request)
            except HiMAPError as error:
                _forget_images(self, request)
                raise VLLMValidationError(str(error), parameter=error.parameter) from error
            except Exception:
                _forget_images(self, request)
                raise
        return request

    setattr(process_inputs, _MARK, True)
    InputProcessor.process_inputs = process_inputs


def _forget_images(input_processor: Any, request: Any) -> None:
    """Have vLLM send the images of a refused request again, when they come again.

    * `vllm.multimodal.cache.base.BaseMultiModalProcessorCache.invalidate`,
      `vllm.v1.engine.input_processor.InputProcessor.renderer` (called): the API process takes an
      image for sent as soon as it has processed it, and the engine core, which never got it, fails
      the next request that has it. Remove when: vLLM keeps both caches alike if a request is
      refused behind its processor.
    """
    cache = input_processor.renderer.mm_processor_cache
    for feature in request.mm_features or ():
        if cache is not None and feature.mm_hash is not None:
            cache.invalidate(feature.mm_hash)
