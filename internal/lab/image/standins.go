package image

import (
	"os"

	"github.com/fathom-network/fathom/internal/kit"
)

// hasHTTPEcho reports whether the kit has http-echo. Only stand-ins need it, so that an older kit without it is still
// usable for the rest.
func hasHTTPEcho(k kit.Kit) bool {
	_, err := os.Stat(k.Program("http-echo"))
	return err == nil
}

// standInTrees returns the layers of the stand-ins that need nothing but the tools; internal/facts/standin says what they
// stand in for.
func standInTrees() map[string]tree {
	packages := tree{}
	packages.write("/usr/bin/apt-get", packageManager, 0o755)
	for _, name := range []string{"apk", "apt"} {
		packages.link("/usr/bin/"+name, "apt-get")
	}

	alpine := tree{}
	alpine.write("/etc/os-release", osRelease("alpine"), 0o644)

	debian := tree{}
	debian.write("/etc/os-release", osRelease("debian"), 0o644)

	curl := tree{}
	curl.write("/entrypoint.sh", curlEntrypoint, 0o755)

	return map[string]tree{layerPackages: packages, layerAlpine: alpine, layerDebian: debian, layerCurl: curl}
}

// osRelease is an image's /etc/os-release.
func osRelease(name string) string {
	return "ID=" + name + "\nNAME=\"stand-in for " + name + "\"\nPRETTY_NAME=\"Fathom's stand-in for " + name + "\"\nHOME_URL=\"https://fathom.network\"\n"
}

// packageManager replaces package managers. It says what is there already and what cannot be installed. Many exercises
// begin with the installation of curl, dig or ping, which are there.
const packageManager = `#!/bin/sh
# In the place of apk, apt-get and apt. This image is a stand-in by Fathom: it has the programs of the lab's toolbox, and
# nothing can be installed.
me=${0##*/}
action=
missing=
for word in "$@"; do
	case $word in
	-*) continue ;;
	esac
	if [ -z "$action" ]; then
		action=$word
		continue
	fi
	word=${word%%[=<>~@]*}
	case $word in
	bash | busybox | busybox-extras | ca-certificates | conntrack | conntrack-tools | coreutils | curl | ethtool | findutils | \
	iperf | iperf3 | iproute2 | ipset | iptables | iputils | jq | kmod | nftables | procps | socat | tcpdump | util-linux | wget) ;;
	bind-tools | bind9-dnsutils | bind9-host | dnsutils | inetutils-ping | iputils-ping | net-tools | \
	netcat | netcat-openbsd | netcat-traditional | telnet | vim-tiny) ;;
	*) missing="$missing $word" ;;
	esac
done
case $action in
update | upgrade | clean | autoremove | "") exit 0 ;;
add | install) ;;
*)
	echo "$me: this image is a stand-in by Fathom and has no package manager" >&2
	exit 1
	;;
esac
if [ -z "$missing" ]; then
	echo "$me: what is asked for is in this image already, which is a stand-in by Fathom"
	exit 0
fi
echo "$me: not to be had:$missing. This image is a stand-in by Fathom, in which nothing can be installed; see what it has with: busybox --list; ls /usr/bin. With the real image in a file: fathom image load FILE" >&2
exit 1
`

// curlEntrypoint works like the entrypoint of curlimages/curl: arguments that are not a program are curl's.
const curlEntrypoint = `#!/bin/sh
case $1 in
-* | *://*) set -- curl "$@" ;;
esac
command -v -- "$1" >/dev/null || set -- curl "$@"
exec "$@"
`
