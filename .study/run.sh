#!/usr/bin/env bash
# One point of the figure: pretrains, fine-tunes, measures on the test images, appends to .study/results.jsonl.
#
#   export CIFAR=/path/to/cifar10               # train/CLASS/*.jpg, 50,000 images, and val/CLASS/*.jpg, 10,000
#   bash .study/run.sh data                     # once: splits the training images into 45,000 and 5,000 held back
#   bash .study/run.sh CURVE EPOCHS SEED [LR]   # CURVE: see below; EPOCHS: 0.5 = 22,500 crops, 2 = 90,000 ...
#   SPLIT=held bash .study/run.sh ...           # measures on the 5,000 held-back images instead, to choose a rate
#
# Run it from the repository's root. A point that is in results.jsonl is not computed again; one that was killed
# continues. One thread each: two points run side by side on two cores.
set -euo pipefail
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
work=runs/study
split=${SPLIT:-test}
python=${PYTHON:-python}

if [ "$1" = data ]; then
    $python - "$CIFAR" $work/data <<'PY'
import os, sys
source, target = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
def link(split, name, class_name, files):
    folder = f"{target}/{name}/{class_name}"
    os.makedirs(folder, exist_ok=True)
    for file in files:
        os.symlink(f"{source}/{split}/{class_name}/{file}", f"{folder}/{file}")
for class_name in sorted(os.listdir(f"{source}/train")):
    files = sorted(os.listdir(f"{source}/train/{class_name}"))
    link("train", "train", class_name, files[:-500])                  # 45,000
    link("train", "half", class_name, files[:-500:2])                 # 22,500 of them
    link("train", "held", class_name, files[-500:])                   # 5,000
    link("train", "watch", class_name, files[-500::100])              # 50 of these, to watch training with
    link("val", "test", class_name, sorted(os.listdir(f"{source}/val/{class_name}")))
for name, train, val in (("pretrain", "train", "held"), ("pretrain_half", "half", "held"),
                         ("tune", "train", "watch"), ("tune_held", "train", "held"), ("tune_test", "train", "test")):
    os.makedirs(f"{target}/{name}", exist_ok=True)
    os.symlink(f"{target}/{train}", f"{target}/{name}/train")
    os.symlink(f"{target}/{val}", f"{target}/{name}/val")
PY
    exit
fi

curve=$1 epochs=$2 seed=$3 lr=${4:-}
vit="--model vit_nano --img_size 32 --patch_size 8"
resnet="--model resnet_nano --img_size 32 --patch_size 8"
energy="energy_pretrain.py $vit --energy_steps 1 --mask_cell 8"
autoencoder="energy_pretrain.py $vit --method autoencoder --mask_cell 8"
cim="cim_pretrain.py --tokenizer train --tokenizer_dir $work/tokenizer"
case $curve in                                                        # command, and the best rate at 2 epochs
    scratch)           untrained="vit_nano batch" ;;
    scratch_resnet)    untrained="resnet_nano batch" ;;
    scratch_groupnorm) untrained="resnet_nano group" ;;             # the norm that the energy method takes
    energy_sr8)      command="$energy --corrupt sr --sr_scale 8" best=3e-3 ;;
    energy_mix8)     command="$energy --corrupt mix --sr_scale 8" best=3e-3 ;;
    energy_scale1)   command="$energy --corrupt sr --sr_scale 4 --energy_scale 1" best=3e-3 ;;    # the paper's energy
    energy_cls)      command="$energy --corrupt sr --sr_scale 4 --pool cls" best=3e-3 ;;
    energy_n0)       command="$energy --corrupt sr --sr_scale 4 --energy_steps 0" best=3e-3 ;;
    energy_n2)       command="$energy --corrupt sr --sr_scale 4 --energy_steps 2" best=3e-3 ;;
    energy_alpha)    command="$energy --corrupt sr --sr_scale 4 --alpha predicted" best=3e-3 ;;
    energy_decay*)   command="$energy --corrupt sr --sr_scale 4 --weight_decay ${curve#*_decay}" best=3e-3 ;;
    energy_batch128) command="$energy --corrupt sr --sr_scale 4" best=3e-3 batch=128 ;;
    energy_step1)    command="$energy --corrupt sr --sr_scale 4" best=3e-3 edit="s/^ALPHA = 0.1 /ALPHA = 1.0 /" ;;
    energy_step0.01) command="$energy --corrupt sr --sr_scale 4" best=3e-3 edit="s/^ALPHA = 0.1 /ALPHA = 0.01 /" ;;
    energy_grid4)    command="$energy --corrupt grid --mask_cell 4" best=3e-3 ;;
    energy_mix4)     command="$energy --corrupt mix --sr_scale 4 --mask_cell 4" best=3e-3 ;;
    energy_mix_*)    command="$energy --corrupt mix --sr_scale 4" best=3e-3 edit="s/^\(MIX = .*\)\"${curve#energy_mix_no_}\", /\1/" ;;
    energy_resnet)   command="energy_pretrain.py $resnet --energy_steps 1 --corrupt sr --sr_scale 4" best=1e-3 ;;
    energy_*)        command="$energy --sr_scale 4 --corrupt ${curve#energy_}" best=3e-3 ;;      # sr, grid, mix ...
    autoencoder_sr8) command="$autoencoder --corrupt sr --sr_scale 8" best=3e-3 ;;
    autoencoder_decay*) command="$autoencoder --corrupt sr --sr_scale 4 --weight_decay ${curve#*_decay}" best=3e-3 ;;
    autoencoder_*)   command="$autoencoder --sr_scale 4 --corrupt ${curve#autoencoder_}" best=3e-3 ;;
    mae)             command="$autoencoder --corrupt grid" best=1e-3 ;;
    mae_decay*)      command="$autoencoder --corrupt grid --weight_decay ${curve#*_decay}" best=1e-3 ;;
    respix)          command="$cim $vit" best=1e-2 ;;
    respix_uniform)  command="$cim $vit --sampling uniform" best=1e-2 ;;
    respix_argmax)   command="$cim $vit --sampling argmax" best=1e-2 ;;
    respix_pixels)   command="$cim $vit --target none" best=1e-2 ;;
    respix_patch)    command="$cim $vit --target patch" best=1e-2 ;;
    respix_unshared) command="$cim $vit --share 0" best=1e-2 ;;
    respix_depth2)   command="$cim $vit --gen_depth 2" best=1e-2 ;;
    respix_block)    command="$cim $vit --masking block --mask_ratio .4 .4" best=1e-2 ;;
    respix_mae)      command="cim_pretrain.py $vit --generator mae" best=1e-2 ;;
    respix_erase)    command="cim_pretrain.py $vit --generator erase" best=1e-2 ;;
    respix_resnet)   command="$cim $resnet" best=1e-3 ;;
    revdet)          command="$cim $vit --objective revdet" best=3e-3 ;;
    revdet_resnet)   command="$cim $resnet --objective revdet" best=3e-4 ;;
    beit)            command="$cim $vit --objective none" best=3e-3 ;;
    *) echo "unknown curve $curve"; exit 1 ;;
esac
lr=${lr:-${best:-0}} batch=${batch:-32}
name=${curve}_${epochs}_${lr}_$seed
run=$work/$name
results=.study/results.jsonl
touch $results

if [ -n "${untrained:-}" ]; then
    mkdir -p $run
    $python - $untrained $seed $run/backbone.pt <<'PY'
import sys, torch, models
model, norm, seed, path = sys.argv[1:]
torch.manual_seed(int(seed))
config = {"model": model, "img_size": 32, "patch_size": 8, "pool": "mean", "norm": norm}
torch.save({"model": models.build_backbone(**config).state_dict(), "config": config}, path)
PY
else
    data=$work/data/pretrain whole_epochs=$epochs
    compile=""
    if [ "$epochs" -gt 1 ] 2>/dev/null; then compile=--compile; fi    # starting it takes half a minute
    if [ "$epochs" = 0.5 ]; then data=$work/data/pretrain_half whole_epochs=1; fi
    if [[ $command == cim* ]] && [ ! -f $work/tokenizer/dvae.pt ]; then   # one tokenizer for all CIM points
        $python cim_pretrain.py --data $work/data/pretrain $vit --batch_size 32 --tokenizer train --tokenizer_steps 2000 \
            --max_steps 1 --num_workers 0 --output_dir $work/tokenizer > $work/tokenizer.log
    fi
    if [ -n "${edit:-}" ]; then                                       # a constant of the script is changed
        sed "$edit" energy_pretrain.py > $work/$curve.py
        command="$work/$curve.py ${command#* }"
        export PYTHONPATH=$PWD
    fi
    if [ ! -f $run/done ]; then
        $python $command --data $data --batch_size $batch --epochs $whole_epochs --lr $lr --seed $seed --num_workers 0 \
            $compile --output_dir $run --resume > $run.log
        touch $run/done
    fi
fi

commit=$(git rev-parse --short HEAD)
key() { echo "\"curve\": \"$curve\", \"epochs\": $epochs, \"lr\": $lr, \"seed\": $seed, \"split\": \"$split\", \"measure\": \"$1\""; }
for measure in ${MEASURES:-probe few2_60}; do
    if [ $measure = probe ]; then                                     # ridge regression, three draws of 5,000 labels
        if grep -qF "$(key probe)" $results; then continue; fi
        $python .study/probe.py $work/data/tune_$split $run/backbone.pt > $run.probe
        while read -r line; do echo "{$(key probe), \"commit\": \"$commit\", ${line#\{}"; done < $run.probe >> $results
        continue
    fi
    for tune_seed in ${TUNE_SEEDS:-0 1 2}; do
        if grep -qF "$(key $measure), \"tune_seed\": $tune_seed" $results; then continue; fi
        case $measure in
            few2)    tune="--label_fraction 0.0222 --epochs 20" ;;    # 1,000 images
            few2_*)  tune="--label_fraction 0.0222 --epochs ${measure#few2_}" ;;   # few2_60: for 60 epochs
            few10)   tune="--label_fraction 0.1 --epochs 10" ;;       # 4,500
            few10_*) tune="--label_fraction 0.1 --epochs ${measure#few10_}" ;;
        esac
        folder=$run/${measure}_$tune_seed
        $python finetune.py --data $work/data/tune --init $run/backbone.pt --recipe short $tune --seed $tune_seed \
            --num_workers 0 --output_dir $folder --resume > $run.$measure.log
        measured=$($python finetune.py --data $work/data/tune_$split --eval_only --num_workers 0 \
            --init $folder/checkpoint.pt | tail -n 1)
        echo "{$(key $measure), \"tune_seed\": $tune_seed, \"commit\": \"$commit\", ${measured#\{}" >> $results
    done
done
