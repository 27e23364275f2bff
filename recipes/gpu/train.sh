#!/bin/sh
# One slice of one training run at the paper's size, at most SECONDS long (540); the same command again continues it, and a run that has
# reached its max_time ends at once.
#
#     sh recipes/gpu/train.sh glow [SECONDS]                   first: the prior
#     sh recipes/gpu/train.sh flow-denoising [SECONDS]         then: flow, resnet or unet, with -pre from the denoiser's weights, for
#                                                              denoising, inpainting, deblurring or deblurring-noise
#     sh recipes/gpu/train.sh mean-denoising [SECONDS]         or compact-...: flows that shrink towards a predicted mean; no prior is needed
#     sh recipes/gpu/train.sh eight-denoising [SECONDS]        as flow-denoising, on eight GPUs
#     sh recipes/gpu/train.sh denoiser-unet [SECONDS]          pre-training of resnet or unet
#     sh recipes/gpu/train.sh medium [SECONDS]                 and then medium-denoising, medium-inpainting, medium-deblurring: those that ship
#
# Afterwards: flowprox evaluate --config recipes/evaluate/wei-gpu.yaml, with --scale paper when flow, resnet and unet are trained too.
#
# Without arguments: the names, in an order that respects what needs what.
set -eu
here=$(dirname "$0")
names="glow"
for problem in denoising inpainting deblurring deblurring-noise; do names="$names flow-$problem"; done
for net in mean compact eight; do
    for problem in denoising inpainting deblurring deblurring-noise; do names="$names $net-$problem"; done
done
for net in resnet unet; do
    names="$names denoiser-$net"
    for problem in denoising inpainting deblurring deblurring-noise; do names="$names $net-$problem $net-pre-$problem"; done
done
names="$names medium medium-denoising medium-inpainting medium-deblurring"
if [ $# -eq 0 ]; then echo "$names" | tr ' ' '\n'; exit 0; fi

name=$1
case " $names " in *" $name "*) ;; *) echo "unknown run $name; one of: $names" >&2; exit 2 ;; esac
slice="timeout --signal=TERM ${2:-540} flowprox"

case $name in
glow)
    exec $slice train-flow --config "$here/glow.yaml" --out runs/gpu/glow --resume ;;
denoiser-*)
    exec $slice train-denoiser --config "$here/denoiser.yaml" --denoiser.prox "${name#denoiser-}" --out "runs/gpu/$name" --resume ;;
medium)
    exec $slice train-unfolded --config "$here/medium.yaml" --out "runs/gpu/$name" --resume ;;
medium-*)
    exec $slice train-unfolded --config "$here/medium.yaml" --config "$here/$name.yaml" --out "runs/gpu/$name" --resume ;;
esac

prox=${name%%-*}
problem=${name#"$prox"-}
set -- --config "$here/unfolded.yaml"
if [ "${problem#pre-}" != "$problem" ]; then
    problem=${problem#pre-}
    pretrained="--model.pretrained runs/gpu/denoiser-$prox/model"
fi
if [ "$problem" != denoising ]; then set -- "$@" --config "$here/$problem.yaml"; fi
if [ "$prox" != flow ]; then set -- "$@" --config "$here/$prox.yaml"; fi
exec $slice train-unfolded "$@" ${pretrained:-} --name "$name" --out "runs/gpu/$name" --resume
