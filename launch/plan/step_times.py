"""What a step of a plan takes, phase by phase: operations over the device's rates, messages over the fabric's.

step = encode + gather + statistics + loss + reduce_scatter + encode_again + parameters + optimizer + control. Batches are put
together beside the step, and ranks are taken to be alike, so data and idle are 0: what is measured beyond that is theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gradcache.traffic import Message, sent_bytes
from launch.fabric import Fabric
from launch.plan.devices import PlannedDevice
from launch.plan.planned_model import PlannedModel
from launch.plan.step_work import Chunks, StepLoad, StepWork
from trainer.job import TrainJob

# Of the time in which a backward runs, what synchronisation of parameters can hide in. On a CPU both want the same cores.
HIDING_SHARE = {"cuda": 1.0, "cpu": 0.0}
LAUNCHES = 25  # kernels of a layer's forward, some of BERT's; a backward has twice as many


@dataclass(frozen=True, kw_only=True)
class PlannedTimes:
    """Seconds of a step."""

    phases: dict[str, float]  # they add up to the step
    hidden_s: float  # of the parameters' synchronisation, beside the backward
    network_s: dict[str, float]  # of the phases, in messages; those that hide are among them

    @property
    def step_s(self) -> float:
        """With the synchronisation of parameters beside the last backward."""
        return sum(self.phases.values())

    @property
    def without_overlap_s(self) -> float:
        """With one after the other."""
        return self.step_s + self.hidden_s

    @property
    def bottleneck(self) -> str:
        """The phase that takes most, and of what."""
        name = max(self.phases, key=lambda phase: self.phases[phase])
        if 2 * self.network_s.get(name, 0.0) > self.phases[name]:
            return f"{name} (network)"
        return f"{name} ({'memory' if name == 'optimizer' else 'products'})"


def step_times(
    job: TrainJob,
    model: PlannedModel,
    device: PlannedDevice,
    fabric: Fabric | None,
    work: StepWork,
    chunks: Chunks,
    load: StepLoad,
) -> PlannedTimes:
    """Return what a step takes on ranks that are alike."""
    encode_s, again_s = _encoding_seconds(job, model, device, work, chunks)
    products = device.rate(job.precision.products) * device.loss_share
    sent = _network_seconds(fabric, load.messages, work.num_ranks)
    sync_s = sent.get("parameters", 0.0)
    hidden_s = min(sync_s, _hiding_seconds(job, device, chunks, encode_s, again_s))
    phases = {
        "data": 0.0,
        "encode": encode_s,
        "gather": sent.get("gather", 0.0),
        "statistics": load.flops["statistics"] / products + sent.get("statistics", 0.0),
        "loss": load.flops["loss"] / products,
        "reduce_scatter": sent.get("reduce_scatter", 0.0),
        "encode_again": again_s,
        "parameters": sync_s - hidden_s,
        "optimizer": load.update_bytes / device.memory_bytes_per_s,
        "control": sent.get("control", 0.0),
        "idle": 0.0,
        "rest": 0.0,
    }
    return PlannedTimes(phases=phases, hidden_s=hidden_s, network_s=sent)


def encoder_rates(job: TrainJob, device: PlannedDevice) -> tuple[float, float]:
    """Return the encoder's operations per second without graph, and forward and backward."""
    gain = device.compiled_gain if job.model.compile is not False else 1.0
    rate = device.rate(job.precision.encode) * gain
    return rate * device.forward_share, rate * device.both_share


def _encoding_seconds(
    job: TrainJob, model: PlannedModel, device: PlannedDevice, work: StepWork, chunks: Chunks
) -> tuple[float, float]:
    """Return the seconds of the first encoding, and of the second with the backward."""
    forward_rate, both_rate = encoder_rates(job, device)
    forward, backward = (flops(chunks.tokens, work.mean_length) for flops in (model.forward_flops, model.backward_flops))
    if job.model.checkpoint_activations:  # the layers run once more inside the backward
        backward += forward
    kept = 1 - chunks.share_twice
    # A forward with graph runs at the rate of forward and backward.
    encode_s = kept * forward / both_rate + chunks.share_twice * forward / forward_rate
    again_s = (chunks.share_twice * forward + backward) / both_rate
    launched_s = chunks.num * model.num_layers * LAUNCHES * device.launch_s  # what the host takes for a forward of all chunks
    return max(encode_s, launched_s), max(again_s, (2 + chunks.share_twice) * launched_s)


def _hiding_seconds(job: TrainJob, device: PlannedDevice, chunks: Chunks, encode_s: float, again_s: float) -> float:
    """Return the seconds in which a synchronisation of parameters can run beside products."""
    share = HIDING_SHARE[device.type]
    if job.parallel.backend in ("fsdp2", "zero3"):  # layers are gathered while the ones before them are at work
        return share * (encode_s + again_s)
    if job.parallel.backend != "ddp" or len(_towers(job)) > 1:
        return 0.0  # DeepSpeed reduces behind the backward
    # Buckets are reduced from the last layer's on, in the backward of the last chunk alone: two thirds of its second encoding.
    return share * again_s / chunks.num * (2 / 3)


def _towers(job: TrainJob) -> tuple[str, ...]:
    return ("query", "passage") if job.model.towers == "two" else ("one",)


def _network_seconds(fabric: Fabric | None, messages: Sequence[Message], num_ranks: int) -> dict[str, float]:
    found: dict[str, float] = {}
    known: dict[Message, float] = {}  # a layer's gathers are many, and alike
    for message in messages:
        assert fabric is not None, "several ranks send something, and a plan of them has a fabric"
        if message not in known:
            known[message] = fabric.seconds(message.collective, message.num_bytes, num_ranks)
        found[message.phase] = found.get(message.phase, 0.0) + known[message]
    return found


def phase_bytes(messages: Sequence[Message], num_ranks: int) -> dict[str, float]:
    """Return what a rank sends in each phase."""
    found: dict[str, float] = {}
    for message in messages:
        found[message.phase] = found.get(message.phase, 0.0) + sent_bytes(message, num_ranks)
    return found
