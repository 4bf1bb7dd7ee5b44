#!/usr/bin/env bash
# Makes an environment with a real Triton server:   scripts/triton_environment.sh VENV [REQUIREMENT...]
#
# Without requirements it gets what the tests need.
# The server is the one inside nvidia-pytriton's wheel; it runs on any Linux with Python 3.11, without a GPU and without
# a container. It bundles the Python backend only. NumPy must be below 2: with a newer one that backend returns empty
# or zero tensors, silently.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
shift
[ $# -gt 0 ] || set -- "nvidia-pytriton==0.7.0" "onnxruntime==1.23.2" "numpy==1.26.4" "tritonclient[grpc]<2.70"

python=${PYTHON:-python3.11}
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  echo "topfive: the Triton of nvidia-pytriton needs Python 3.11, and $python is none; set PYTHON=/path/to/python3.11." >&2
  exit 1
fi
"$python" -m venv "$venv"
"$venv/bin/pip" install --disable-pip-version-check "$@"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
server=$site/pytriton/tritonserver
cp "$server/python_backend_stubs/3.11/triton_python_backend_stub" "$server/backends/python/"

# The server, ready to be called from anywhere with Triton's own options.
cat > "$venv/bin/tritonserver" <<SCRIPT
#!/usr/bin/env bash
venv=\$(cd "\$(dirname "\$0")/.." && pwd)
server=\$venv/lib/python3.11/site-packages/pytriton/tritonserver
export PATH=\$venv/bin:\$PATH
export LD_LIBRARY_PATH=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
exec "\$server/bin/tritonserver" --backend-directory="\$server/backends" "\$@"
SCRIPT
chmod +x "$venv/bin/tritonserver"
