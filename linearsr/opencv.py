"""OpenCV, loaded when it is first needed: only degradations of second order use it."""

from types import ModuleType

from linearsr.degradation_config import Degradation, SecondOrderDegradation


class DegradationError(RuntimeError):
    """A degradation that cannot run on this machine."""


def opencv() -> ModuleType:
    """Return the module `cv2`.

    Raises:
        DegradationError: if it is not installed, with the extra that brings it.
    """
    try:
        import cv2
    except ImportError as error:
        message = f'degradation: got {error}; expected OpenCV; fix: pip install "linearsr[platform]", or degradation.preset quickstart'
        raise DegradationError(message) from error
    return cv2


def check_installed(config: Degradation) -> None:
    """Refuse a degradation that needs OpenCV where there is none.

    Raises:
        DegradationError: as `opencv`.
    """
    if isinstance(config, SecondOrderDegradation):
        opencv()
