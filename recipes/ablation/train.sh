#!/bin/sh
# Train every network of the ablation, one after the other; the same command continues where it was stopped.
#   sh recipes/ablation/train.sh           small, into runs/ablation
#   sh recipes/ablation/train.sh paper     with the paper's Glow and 64x64 images, into runs/ablation-paper
set -eu
here=$(dirname "$0")
runs=runs/ablation
if [ "${1:-small}" = paper ]; then runs=runs/ablation-paper; fi

train() {  # name, command, recipes
    name=$1 command=$2
    shift 2
    if [ "$runs" = runs/ablation-paper ]; then set -- "$@" --config "$here/../paper/$command-ablation.yaml"; fi
    flowprox "$command" "$@" --name "$name" --out "$runs/$name" --resume
}

train flow train-flow --config "$here/flow.yaml"
train flow-noisy train-flow --config "$here/flow.yaml" --config "$here/flow-noisy.yaml"
train base train-unfolded --config "$here/base.yaml"
for name in tied folds-1 folds-4 start-adjoint no-last-shrinkage likelihood laplace one-shrinkage; do
    train "$name" train-unfolded --config "$here/base.yaml" --config "$here/$name.yaml"
done
for name in flow flow-noisy; do
    variant=pretrained${name#flow}
    train "$variant" train-unfolded --config "$here/base.yaml" --config "$here/$variant.yaml" --model.flow "$runs/$name/model"
done
train folds-8 train-unfolded --config "$here/base.yaml" --config "$here/folds-8.yaml"
