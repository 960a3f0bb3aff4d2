#!/usr/bin/env bash
# Builds the images of this project from a checkout.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: infra/images/build.sh [--push] [TARGET...]

Builds the images cpu, gpu and mlflow, or only the TARGETs that are named.

  --push   push each image after it was built
  --help   show this text

Variables:
  REGISTRY     registry and folder of the images       (registry.example.org)
  VERSION      their tag                               (the version in pyproject.toml)
  DOCKER       docker or podman                        (docker)
  TORCH_INDEX  package index with torch's CPU build, for the target cpu; without it cpu gets the CUDA build too
  EXTRAS       extras of this project in cpu and gpu   (platform,metrics,photos,sana,tags,text; metrics has a noncommercial licence)
  PYTHON_IMAGE the base, for instance with a digest    (the tag in the Dockerfile)
TEXT
}

targets=()
push=false
for word in "$@"; do
  case "$word" in
    --help | -h) usage; exit 0 ;;
    --push) push=true ;;
    cpu | gpu | mlflow) targets+=("$word") ;;
    *)
      echo "build.sh: got ${word}; expected cpu, gpu or mlflow; fix: see --help" >&2
      exit 2
      ;;
  esac
done
((${#targets[@]})) || targets=(cpu gpu mlflow)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
registry=${REGISTRY:-registry.example.org}
docker=${DOCKER:-docker}
version=${VERSION:-$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)}
if [[ -z "$version" ]]; then
  echo "build.sh: got no version in pyproject.toml; expected version = \"...\"; fix: set VERSION" >&2
  exit 2
fi
# Where the checkout has no git, the image says so.
revision=$(git rev-parse HEAD 2> /dev/null || echo unknown)

for target in "${targets[@]}"; do
  arguments=()
  [[ -z "${PYTHON_IMAGE:-}" ]] || arguments+=(--build-arg "PYTHON_IMAGE=${PYTHON_IMAGE}")
  if [[ "$target" == mlflow ]]; then
    image="${registry}/linearsr-mlflow:$(sed -n 's/^mlflow==//p' infra/images/constraints.txt)"
    arguments+=(--file infra/images/Dockerfile.mlflow)
  else
    image="${registry}/linearsr:${version}-${target}"
    arguments+=(--file infra/images/Dockerfile --target "$target" --build-arg "VERSION=${version}" --build-arg "REVISION=${revision}")
    [[ -z "${EXTRAS:-}" ]] || arguments+=(--build-arg "EXTRAS=${EXTRAS}")
    [[ "$target" != cpu || -z "${TORCH_INDEX:-}" ]] || arguments+=(--build-arg "TORCH_INDEX=${TORCH_INDEX}")
  fi
  echo "Building ${image}"
  DOCKER_BUILDKIT=1 "$docker" build "${arguments[@]}" --tag "$image" .
  if $push; then
    "$docker" push "$image"
  fi
done
