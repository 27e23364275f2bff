#!/bin/sh
# Train the three networks of recipes/evaluate/wei-table2.yaml; the same command continues where it was stopped.
set -eu
here=$(dirname "$0")

flowprox train-unfolded --config "$here/base.yaml" --name denoising --out runs/plug-and-play/denoising --resume
for problem in inpainting deblurring; do
    flowprox train-unfolded --config "$here/base.yaml" --config "$here/$problem.yaml" --out "runs/plug-and-play/$problem" --resume
done
