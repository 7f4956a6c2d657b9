#!/bin/sh
# The pictures of the recipe `pictures`: 4,000 drawings of Debian's packages openclipart-png and openclipart-svg (public
# domain), as a folder with a folder a class and metadata.jsonl with captions.
#   examples/pictures.sh PATH               # with apt on Debian or Ubuntu: downloads 150 MB, installs nothing
#   examples/pictures.sh PATH COLLECTION    # of a folder: png/CLASS/... and svg/CLASS/..., or the class folders itself
# pictures.py has the rule by which pictures are chosen. PYTHON names the Python to use.
set -eu
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 PATH [COLLECTION]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
if [ $# -eq 2 ]; then
    exec "$python" "$here/pictures.py" "$2" "$1"
fi
if ! command -v apt-get > /dev/null || ! command -v dpkg-deb > /dev/null; then
    echo "$0: there is no apt-get here; download Debian's openclipart-png and openclipart-svg, unpack them, and give" \
        "their folder usr/share/openclipart as COLLECTION" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get download openclipart-png openclipart-svg)
for package in "$work"/*.deb; do
    dpkg-deb -x "$package" "$work/packages"
done
"$python" "$here/pictures.py" "$work/packages/usr/share/openclipart" "$1"
