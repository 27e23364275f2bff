#!/bin/sh
# Train the compact prior at every bit depth from 3 to 8, 1,500 steps each, into runs/bits, and the one that ships at 5 bits;
# recipes/evaluate/bit-depth.yaml compares them.
set -eu
here=$(dirname "$0")

for bits in 3 4 5 6 7 8; do
    flowprox train-flow --config "$here/../glow-faces64.yaml" --likelihood.bit_depth "$bits" --training.max_time null \
        --training.max_steps 1500 --name "bits$bits" --out "runs/bits/$bits" --resume
done
flowprox train-flow --config "$here/../glow-faces64.yaml" --config "$here/glow-5bits-faces64.yaml" --out runs/glow-5bits-faces64 --resume
