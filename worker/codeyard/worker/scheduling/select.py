"""From settings to a policy: the one place that knows which policies there are."""

from codeyard.shared.settings import AdmissionSettings
from codeyard.worker.engines.port import EngineInfo
from codeyard.worker.scheduling.adaptive import AdaptiveScheduler
from codeyard.worker.scheduling.port import Scheduler
from codeyard.worker.scheduling.step_time import PRIOR, StepCost
from codeyard.worker.scheduling.straight import Straight
from codeyard.worker.scheduling.weighted import WeightedLanes


def make_scheduler(settings: AdmissionSettings, info: EngineInfo, prior: StepCost = PRIOR) -> Scheduler:
    """A fresh policy object for one loaded engine, whose steps take about `prior`."""
    if settings.policy == "straight":
        return Straight()
    if settings.policy == "fixed":
        return WeightedLanes(
            slots=min(settings.window or info.max_running, info.max_running),
            continuous=info.continuous,
            shares=settings.shares,
            linger_s=settings.linger_s,
        )
    return AdaptiveScheduler(settings, slots=info.max_running, continuous=info.continuous, prior=prior)
