"""`trainings.py` with FSDP2 on CPUs: accelerate shards over processes with GPUs only, so it is told that these are."""

import accelerate.state
import trainings
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from modeling_speculator.trainers import SpeculatorTrainer
from modeling_speculator.trainers.metrics import HeadWindow


PartialState(cpu=True)
forget = accelerate.state.AcceleratorState._reset_state


def forget_and_claim_gpus(reset_partial_state=False):
    """For `TrainingArguments`, which begins by forgetting what is known of the processes."""
    forget(False)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


accelerate.state.AcceleratorState._reset_state = staticmethod(forget_and_claim_gpus)
PartialState._reset_state = staticmethod(lambda: None)

train = SpeculatorTrainer.train


def train_and_tell(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    assert self.accelerator.distributed_type == DistributedType.FSDP
    assert all(isinstance(weight, DTensor) for weight in self.model.parameters())
    policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
    sums = policy and policy.reduce_dtype
    # At once: two processes print.
    print(f"a share of the speculator\nlosses in {self.heads_dtype}\nsums of gradients in {sums}\n", end="")
    return result


add = HeadWindow.add


def add_and_tell(self, outputs):
    """What the objective returned, as it came out of the sharded model."""
    SpeculatorTrainer.heads_dtype = outputs.row_losses.dtype
    assert outputs.loss.dtype == outputs.correct.dtype == outputs.row_losses.dtype
    add(self, outputs)


HeadWindow.add = add_and_tell
SpeculatorTrainer.train = train_and_tell
trainings.main()
