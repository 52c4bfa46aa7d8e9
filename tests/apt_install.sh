#!/bin/sh
# Install Debian's packages that are missing: tests/apt_install.sh PACKAGE...
missing=
for package; do
  dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
[ -z "$missing" ] && exit
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "these tests need$missing, and only root of a Debian or Ubuntu can install that: apt-get install$missing" >&2
  exit 1
fi
install() {
  apt-get -qq update
  # shellcheck disable=SC2086 - one word for each package
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null
}
install || { sleep 5 && install; } # a download may have failed, or another apt may have been at work
