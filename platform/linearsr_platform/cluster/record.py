"""Which job a folder belongs to, and whether that job is finished. Imports no Ray."""

from pydantic import TypeAdapter

from linearsr_platform import storage
from linearsr_platform.errors import StageError
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome

JOB_FILE = "job.json"
OUTCOME_FILE = "outcome.json"


def job_hash(job: TrainJob) -> str:
    """Return the identity of a job: everything that decides what it computes, and nothing of where it does so."""
    content = TypeAdapter(TrainJob).dump_python(job, mode="json")
    return stable_hash({**content, "train": job.train.decisive()})


def run_name(job: TrainJob) -> str:
    """Return the name of the folder of exactly this job in its storage, of its checkpoints and what Ray Train keeps."""
    return f"{job.name}-{job_hash(job)[:12]}"


def checkpoints_url(storage_url: str, job: TrainJob) -> str:
    """Return the folder of the checkpoints of exactly this job; another recipe never finds it."""
    return storage.join(storage_url, run_name(job), "checkpoints")


def finished_outcome(job: TrainJob) -> TrainOutcome | None:
    """Return what this very job came to, if it has been done; None if not, or if another job wrote its folder.

    Raises:
        StageError: if the outcome is there but not readable.
    """
    url = storage.join(job.output_url, OUTCOME_FILE)
    if not is_claimed(job) or not storage.exists(url):
        return None
    try:
        return TrainOutcome.from_json(storage.read_json(url))
    except ValueError as error:
        raise StageError(f"{url}: {error}; fix: delete it to train {job.name} again") from error


def claim_folder(job: TrainJob) -> None:
    """Make the job's folder its own: an outcome of another job goes."""
    if not is_claimed(job):
        storage.remove(storage.join(job.output_url, OUTCOME_FILE))
        storage.write_json(storage.join(job.output_url, JOB_FILE), {"name": job.name, "hash": job_hash(job)})


def is_claimed(job: TrainJob) -> bool:
    """Tell whether the job's folder is its own, as far as this process sees."""
    url = storage.join(job.output_url, JOB_FILE)
    record = storage.read_json(url) if storage.exists(url) else None
    return isinstance(record, dict) and record.get("hash") == job_hash(job)
