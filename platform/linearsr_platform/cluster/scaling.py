"""How many workers a trainer has, as Ray Train decides it, but that a trainer which starts again takes the place of its former self.

Ray Train asks for a trainer's workers under a new name every time it starts. What one asked for that was killed counts for three minutes
more, and an elastic trainer takes what is left: fewer workers, or none.
"""

from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy, ScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import TrainAutoscalingCoordinatorClient
from ray.train.v2.api.config import ScalingConfig


class Fixed(FixedScalingPolicy):
    """Ray's, with a name that stays."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Ask for the workers."""
        _ask_by_folder(self, train_run_context)


class Elastic(ElasticScalingPolicy):
    """Ray's, with a name that stays."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Ask for the workers."""
        _ask_by_folder(self, train_run_context)


def scaling_policy(config: ScalingConfig) -> ScalingPolicy:
    """Return what decides how many workers a trainer has, as Ray Train chooses it."""
    return Elastic(config) if config.elasticity_enabled else Fixed(config)


def _ask_by_folder(policy: ScalingPolicy, context: TrainRunContext) -> None:
    """Ask under the name of the trainer's folder, which one trainer has at a time."""
    run = context.run_config
    policy._requester_id = f"train-{run.storage_path}/{run.name}"  # noqa: SLF001 (Ray sets it here too, and has no other place for it)
    policy._coordinator_client = TrainAutoscalingCoordinatorClient(policy._requester_id)  # noqa: SLF001
    policy._send_resource_request()  # type: ignore[no-untyped-call]  # noqa: SLF001
