#!/bin/sh
# Train every network that the tables of Wei et al. (2022) and the figures of Asim et al. (2020) and Whang et al. (2021) name at paper
# scale, one after the other: weeks of a GPU. The same command continues where it was stopped.
set -eu
here=$(dirname "$0")

flowprox train-flow --config "$here/glow-paper.yaml" --out runs/glow-paper --resume
flowprox train-flow --config "$here/whang-realnvp.yaml" --out runs/whang-realnvp --resume
flowprox train-gan --config "$here/../dcgan-faces64.yaml" --out runs/dcgan-faces64 --resume
for net in resnet unet; do
    flowprox train-denoiser --config "$here/denoiser.yaml" --denoiser.prox "$net" --out "runs/paper/denoiser-$net" --resume
done

train() {  # name, problem, recipes and options
    name=$1 problem=$2
    shift 2
    if [ "$problem" != denoising ]; then set -- --config "$here/$problem.yaml" "$@"; fi
    flowprox train-unfolded --config "$here/wei.yaml" "$@" --name "$name-$problem" --out "runs/paper/$name-$problem" --resume
}

for problem in denoising inpainting deblurring; do
    train flow "$problem"
    train plug-and-play "$problem" --config "$here/plug-and-play.yaml"
    for net in resnet unet; do
        train "$net" "$problem" --config "$here/$net.yaml"
        if [ "$problem" != denoising ]; then
            train "$net-pre" "$problem" --config "$here/$net.yaml" --model.pretrained "runs/paper/denoiser-$net/model"
        fi
    done
done
