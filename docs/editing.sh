#!/usr/bin/env bash
# The pictures of docs/editing.md: docs/editing.sh DEMO, from the folder that `diffkit demo` has filled.
set -euo pipefail
demo=$1 run=$1/run
images=$(dirname "$0")/images work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
seven=$(ls "$demo"/images/7/*.png | head -1)

diffkit sample "$run" -o "$work/variations" --from "$seven" --strength 0.7 -n 20 --unlabelled
cp "$work/variations/grid.png" "$images/edit-variations.png"

python - "$work/mask.png" <<'PY'
import sys
from PIL import Image

mask = Image.new("L", (16, 16))
mask.paste(255, (8, 0, 16, 16))
mask.save(sys.argv[1])
PY
diffkit sample "$run" -o "$work/inpaint" --from "$seven" --mask "$work/mask.png" --resample 4 -n 20 --unlabelled
cp "$work/inpaint/grid.png" "$images/edit-inpaint.png"

mkdir "$work/six"
for digit in 0 2 3 5 8 9; do cp "$(ls "$demo/images/$digit"/*.png | head -1)" "$work/six/$digit.png"; done
diffkit invert "$run" "$work/six" -o "$work/inverted"
diffkit sample "$run" -o "$work/again" --noise "$work/inverted/noise.npy" --sampler heun --steps 50 --unlabelled
python - "$work" "$images/edit-invert.png" <<'PY'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from diffkit.engine.pictures import grid, psnr, save_png

work = Path(sys.argv[1])
there = [np.asarray(Image.open(path).convert("L")) for path in sorted((work / "six").glob("*.png"))]
made = [np.asarray(Image.open(path).convert("L")) for path in sorted((work / "again").glob("0*.png"))]
print("PSNR", [round(psnr(a, b), 1) for a, b in zip(there, made, strict=True)])
pairs = np.stack([np.stack(there), np.stack(made)], 1).reshape(-1, *there[0].shape, 1)
save_png(Path(sys.argv[2]), grid(pairs, 6))
PY

rm -f "$images"/edit-{between.gif,trajectory.png,trajectory.gif}
diffkit interpolate "$run" -o "$images/edit-between.gif" --seeds 0,1,2,3 --class 2 --class 3 --class 5 --class 8 --loop
diffkit trajectory "$run" -o "$images/edit-trajectory.png" -n 6
diffkit trajectory "$run" -o "$images/edit-trajectory.gif" -n 8 --steps 30
diffkit sample "$run" -o "$work/mixture" --class 3=0.5 --class 8=0.5 -n 20
cp "$work/mixture/grid.png" "$images/edit-mixture.png"

diffkit sample "$run" -o "$work/large" --size 64x96 -n 4 --unlabelled
cp "$work/large/grid.png" "$images/edit-large.png"
