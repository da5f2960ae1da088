"""vLLM's model runner V2 on a CPU, whose Triton kernels are interpreted there: for tests, slow, and right.

python cpu_harness.py MODULE [ARGUMENT ...]     runs a module of vLLM's
import cpu_harness; cpu_harness.install()       before vLLM is imported
"""

import os
import runpy
import sys


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",  # a core for each rank of tensor parallelism
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # vLLM may spawn them all the same: see in_children
}


def install() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [here, os.path.join(here, "in_children"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    claim_triton()
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    def apply_top_k_top_p(logits, k, p, **hints):
        return sampler.apply_top_k_top_p_pytorch(logits, k, p)

    sampler.apply_top_k_top_p_triton = apply_top_k_top_p  # the interpreter can't run its kernel


def claim_triton() -> None:
    """Makes it think that it has a device."""
    from triton.backends import Backend, backends

    backends.clear()
    backends["cpu"] = Backend(compiler=None, driver=Driver)


class Driver:
    """What Triton asks of a backend's driver before it interprets a kernel."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
