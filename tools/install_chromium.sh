#!/bin/sh
# Installs the browser that tests/docs/test_report_browser.py opens reports in: Debian's package, as root.
set -eu

if command -v chromium >/dev/null; then
    chromium --version
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: chromium is not here, and installing it needs root and apt-get" >&2
    echo "  install it by the system's own means; without it the browser's tests are skipped" >&2
    exit 2
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium
chromium --version
