#!/bin/sh
# Train every network of the family, one after the other, into runs/family; the same command continues where it was stopped.
set -eu
here=$(dirname "$0")

train() {  # name, recipes
    name=$1
    shift
    flowprox train-unfolded --config "$here/base.yaml" "$@" --name "$name" --out "runs/family/$name" --resume
}

train base
for name in unet mean mean-no-flow mean-deep mean-two-folds mean-residual mean-unet mean-attention mean-weak mean-two-levels mean-four-levels \
    one-fold coarse tied low-rank small unet-small mean-small four-folds; do
    train "$name" --config "$here/$name.yaml"
done
for name in unet unet-small; do
    train "$name-slow" --config "$here/$name.yaml" --config "$here/slow.yaml"
done
for name in unet unet-small mean; do
    train "$name-fast" --config "$here/$name.yaml" --config "$here/fast.yaml"
done
for rate in fast faster fastest; do
    for name in mean unet mean-small unet-small; do
        train "$name-$rate-decay" --config "$here/$name.yaml" --config "$here/decay.yaml" --config "$here/$rate.yaml"
    done
done
for name in mean mean-small; do
    train "$name-taught" --config "$here/$name.yaml" --config "$here/taught.yaml"
done
for problem in inpainting deblurring; do
    train "$problem-base" --config "$here/$problem.yaml"
    for name in mean mean-no-flow unet; do
        train "$problem-$name" --config "$here/$name.yaml" --config "$here/$problem.yaml"
    done
    train "$problem-unet-fast" --config "$here/unet.yaml" --config "$here/$problem.yaml" --config "$here/fast.yaml"
    train "$problem-mean-fast" --config "$here/mean.yaml" --config "$here/$problem.yaml" --config "$here/fast.yaml"
    train "$problem-mean-decay" --config "$here/mean.yaml" --config "$here/$problem.yaml" --config "$here/decay.yaml"
    for rate in fast faster fastest; do
        for name in mean unet; do
            train "$problem-$name-$rate-decay" --config "$here/$name.yaml" --config "$here/$problem.yaml" --config "$here/decay.yaml" \
                --config "$here/$rate.yaml"
        done
    done
done
