# Sourced by the scripts of this folder, from the repository's root: their environment, captures of
# the tiny teacher, and measurements of models on held-out traces.
#   RECIPE=short   run_short.toml and evaluate_short.toml instead of run.toml and evaluate.toml;
#   RECIPE=tiny    likewise; with NUM_TRAIN=60 NUM_HELDOUT=12 a trial of a whole script
source tools/environment.sh
make_environment
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false
has_gpu || export OMP_NUM_THREADS=1
recipe=${RECIPE:+_$RECIPE}
run_options=tools/truncation/run$recipe.toml evaluate_options=tools/truncation/evaluate$recipe.toml

capture_tiny() { # FOLDER
  local part name
  mkdir -p "$1"
  for part in train:${NUM_TRAIN:-2000} eval:${NUM_HELDOUT:-500}; do
    name=${part%:*}  # a file of its own: a capture with --limit is not complete, nor sealed
    head -n "${part#*:}" "tools/prompts/$name.jsonl" >"$1/$name.jsonl"
    cache-teacher generate --model tools/tiny-teacher --out "$1/$name" --capture-prompt \
      --prompts "$1/$name.jsonl"
  done
}

profile_once() { # FOLDER STUDENT
  [ -e "$1/profile/profile.json" ] ||
    train-student profile --cache "$1/train" --student "$2" --out "$1/profile"
}

measure() { # MODEL CACHE FILE
  [ -e "$3" ] || {
    python tools/truncation/heldout.py measure "$1" "$2" >"$3.part"
    mv "$3.part" "$3"
  }
}
