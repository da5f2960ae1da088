"""Every Python process that vLLM starts reads this first, as `cpu_harness` put its folder into PYTHONPATH."""

import cpu_harness


cpu_harness.claim_triton()
