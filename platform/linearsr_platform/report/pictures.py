"""The section of the report that shows photographs: enlarged details, and whole pictures to flick between."""

from collections.abc import Sequence

from PIL import Image

from linearsr_platform.report.markup import Markup, element, join, metric_label, number
from linearsr_platform.report.model import ReportData
from linearsr_platform.report.strips import Box, PhotoStrip, at_reference_size, data_uri, detail_box, embedded

PAGE_PX = 1120
"""Width of the page's text; a single version is shown at the largest whole multiple of its size that fits."""


def photographs(data: ReportData, strips: Sequence[PhotoStrip]) -> Markup:
    """Return one figure for each photograph whose pictures are given, and say of how many."""
    total = max((len(row.per_photograph) for row in data.evaluation), default=len(strips))
    left = element("p", f"The first {len(strips)} of {total} photographs; all are in the run's folder `pictures`.")
    figures = [_photograph(data, strip, index) for index, strip in enumerate(strips)]
    return join(*figures, *([left] if 0 < len(strips) < total else []))


def _photograph(data: ReportData, strip: PhotoStrip, index: int) -> Markup:
    versions = at_reference_size(strip.images)
    reference = next(reversed(versions.values()))
    box = detail_box(reference)
    scores = {row.label: row.per_photograph.get(strip.name, {}) for row in data.evaluation}
    details = [_detail(data, strip.name, label, image.crop(box), scores.get(label, {})) for label, image in versions.items()]
    wholes = [_whole(strip, label, image, box) for label, image in versions.items()]
    size = f"{reference.width} \u00d7 {reference.height} px"
    left, upper, right, lower = box
    where = f"detail {right - left} \u00d7 {lower - upper} px at ({left}, {upper}), the busiest window of the original"
    return element(
        "article",
        element("h3", strip.name, element("small", f"{size} \u00b7 {where}")),
        element("div", *details, class_="details"),
        element("fieldset", *_choices(strip, index), class_="choices"),
        element("div", *wholes, class_="wholes"),
        class_="photo",
        style=f"--versions:{len(versions)};--size:{reference.width * max(1, PAGE_PX // reference.width)}px",
    )


def _detail(data: ReportData, photo: str, label: str, crop: Image.Image, scores: dict[str, float]) -> Markup:
    shown = dict.fromkeys((data.distortion, data.perceptual))
    written = " \u00b7 ".join(f"{metric_label(name)} {number(scores[name])}" for name in shown if name in scores)
    picture = element("img", src=data_uri(crop, lossless=True), alt=f"Detail of {photo}, {label}", width=crop.width, height=crop.height)
    return element("figure", picture, element("figcaption", element("b", label), element("span", written)))


def _whole(strip: PhotoStrip, label: str, image: Image.Image, box: Box) -> Markup:
    native = strip.images[label].convert("RGB")
    small = native.width * native.height < image.width * image.height
    source = data_uri(native, lossless=True) if small else data_uri(embedded(image), lossless=False)
    left, upper, right, lower = box
    frame = element(
        "i",
        style=f"left:{100 * left / image.width:.2f}%;top:{100 * upper / image.height:.2f}%;"
        f"width:{100 * (right - left) / image.width:.2f}%;height:{100 * (lower - upper) / image.height:.2f}%",
    )
    picture = element(
        "img",
        src=source,
        alt=f"{strip.name}, {label}, whole picture",
        class_="tiny" if small else None,
        style=f"aspect-ratio:{image.width}/{image.height}",
    )
    return element("figure", element("div", picture, frame), element("figcaption", label))


def _choices(strip: PhotoStrip, index: int) -> list[Markup]:
    written = [element("legend", f"Whole picture of {strip.name}: all versions, or one at full size. Arrow keys flick between them.")]
    for place, label in enumerate(("All", *strip.images)):
        button = element("input", type="radio", name=f"photo-{index}", value=str(place), checked=place == 0)
        written.append(element("label", button, element("span", label)))
    return written
