# Sourced by the other scripts: installs system packages with whatever this system has, as root or through sudo.

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# Which package manager this is.
package_manager() {
    local manager
    for manager in apt-get dnf apk brew; do
        if has "$manager"; then echo "$manager"; return; fi
    done
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"
    elif has sudo; then sudo "$@"
    else die "need root for: $* (run this as root, or install sudo)"
    fi
}

# install_packages WHY APT DNF APK BREW: each a list of names, separated by spaces, empty where that system has none.
install_packages() {
    local why=$1 manager names=
    manager=$(package_manager)
    case $manager in
        apt-get) names=$2 ;;
        dnf) names=$3 ;;
        apk) names=$4 ;;
        brew) names=$5 ;;
    esac
    [ -n "$names" ] || die "$why is missing, and this script does not know how to install it here; please install it"
    say "installing $why: $names"
    # shellcheck disable=SC2086  # a list
    case $manager in
        apt-get)
            apt_update_once
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $names
            ;;
        dnf) as_root dnf install -y $names ;;
        apk) as_root apk add --no-cache $names ;;
        brew) brew install $names ;;
    esac
}

# A fresh image has no lists, and old lists name versions that are gone.
apt_update_once() {
    if [ -z "${apt_is_updated:-}" ]; then
        as_root apt-get update
        apt_is_updated=1
    fi
}

# The folder that holds initdb, if there is one in the usual places (pglobby itself looks more closely).
postgres_folder() {
    local folder
    if [ -n "${PGLOBBY_POSTGRES_BIN:-}" ]; then echo "$PGLOBBY_POSTGRES_BIN"; return; fi
    if has initdb; then dirname "$(command -v initdb)"; return; fi
    for folder in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/lib64/pgsql /usr/libexec/postgresql* \
        /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        if [ -x "$folder/initdb" ]; then echo "$folder"; return; fi
    done
}

need_postgres() {
    if [ -n "$(postgres_folder)" ]; then return; fi
    if [ "$(package_manager)" = apt-get ]; then
        say "(this system's package also starts a PostgreSQL of its own on port 5432; pglobby leaves it alone)"
    fi
    install_packages PostgreSQL "postgresql" "postgresql-server postgresql postgresql-contrib" \
        "postgresql postgresql-client postgresql-contrib" "postgresql@17"
    [ -n "$(postgres_folder)" ] || die "PostgreSQL was installed, but its initdb is in no usual place; set PGLOBBY_POSTGRES_BIN"
}

need_rust() {
    if ! has cargo && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH=$HOME/.cargo/bin:$PATH; fi
    has cargo || die "cargo is missing; install Rust 1.89 or newer, see https://www.rust-lang.org/tools/install"
    has cc || install_packages "a C compiler" "gcc libc6-dev" "gcc" "gcc musl-dev" ""
    has make || install_packages "make" "make" "make" "make" "make"
}
