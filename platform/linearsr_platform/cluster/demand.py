"""What there is no room for yet, told to the cluster's autoscaler, which then starts machines for all of it at once."""

import time
from typing import Any
from uuid import uuid4

import ray

from linearsr_platform.cluster.capacity import Share

RENEW_S = 60.0
EXPIRY_S = 180.0
"""After which a request counts no more that nobody renews, because whoever made it was killed."""
ANSWER_S = 5.0


class Demand:
    """A request for room beside what runs; without an autoscaler it changes nothing.

    It goes through the actor that Ray Train's controllers ask through, and counts less than theirs: Ray's `request_resources` knows but
    one request for the whole cluster, which every call replaces. A request is for what a cluster has in all, whoever uses it, so what runs
    must ask too; Ray Train's trainers do.
    """

    def __init__(self) -> None:
        """Ask for nothing yet."""
        self._name = f"linearsr-{uuid4().hex}"
        self._asked, self._asked_s = (Share(cpus=0.0), 0), float("-inf")

    def ask(self, share: Share, workers: int) -> None:
        """Ask for room for so many workers instead of what was asked for before; call it over and over, about once a second is enough.

        Answers nobody: that it could not be asked for costs time and no more.
        """
        now_s = time.monotonic()
        same = self._asked == (share, workers) and (now_s < self._asked_s + RENEW_S or not workers)
        if same or not (workers or self._asked[1]):
            return
        coordinator = _coordinator()
        if workers:
            coordinator.request_resources.remote(requester_id=self._name, resources=[share.resources] * workers, expire_after_s=EXPIRY_S)
        else:
            ray.wait([coordinator.cancel_request.remote(requester_id=self._name)], timeout=ANSWER_S)
        self._asked, self._asked_s = (share, workers), now_s

    def withdraw(self) -> None:
        """Ask for nothing any more; machines that are idle may go."""
        self.ask(Share(cpus=0.0), 0)


def _coordinator() -> Any:
    """Return the actor that adds up requests; it is made if there is none yet."""
    # Takes most of a second, which only a running cluster costs.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

    return get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
