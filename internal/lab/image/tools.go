package image

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
)

// A tool is a program of this machine that goes into the images.
type tool struct {
	name string
	// pkg is the Debian and Ubuntu package of the program, for the error when it is missing.
	pkg string
	// also lists further names of the same program, which acts by the name it is called by.
	also []string
}

// tools are the programs to debug a pod's network with, those that upstream's end-to-end tests call in their pods, and
// those that kube-proxy and flannel call. They come from the machine's packages, which are well built, kept up to date and
// documented.
var tools = []tool{
	// Debian's busybox prefers its own commands to those in $PATH: in its shell, `ip` and `timeout 5 nc` would run
	// busybox's ip and nc. So programs that run other commands are not busybox's.
	{name: "bash", pkg: "bash", also: []string{"sh"}},
	{name: "env", pkg: "coreutils"},
	{name: "find", pkg: "findutils"},
	{name: "nice", pkg: "coreutils"},
	{name: "nohup", pkg: "coreutils"},
	{name: "nsenter", pkg: "util-linux"},
	{name: "setsid", pkg: "util-linux"},
	{name: "timeout", pkg: "coreutils"},
	{name: "xargs", pkg: "findutils"},

	{name: "bridge", pkg: "iproute2"},
	{name: "conntrack", pkg: "conntrack"},
	{name: "curl", pkg: "curl"},
	{name: "dig", pkg: "dnsutils"},
	{name: "ethtool", pkg: "ethtool"},
	{name: "getent", pkg: "libc-bin"}, // resolves as programs do: /etc/hosts, the search list, then DNS
	{name: "host", pkg: "dnsutils"},
	{name: "ip", pkg: "iproute2"},
	{name: "iperf", pkg: "iperf"},
	{name: "iperf3", pkg: "iperf3"},
	{name: "ipset", pkg: "ipset"},
	{name: "jq", pkg: "jq"},
	{name: "kmod", pkg: "kmod", also: []string{"depmod", "insmod", "lsmod", "modinfo", "modprobe", "rmmod"}},
	{name: "nc", pkg: "netcat-openbsd"},
	{name: "nft", pkg: "nftables"},
	{name: "nslookup", pkg: "dnsutils"},
	{name: "nstat", pkg: "iproute2"},
	{name: "ping", pkg: "iputils-ping", also: []string{"ping4", "ping6"}},
	{name: "socat", pkg: "socat"},
	{name: "ss", pkg: "iproute2"},
	{name: "tc", pkg: "iproute2"},
	{name: "tcpdump", pkg: "tcpdump"},
	{name: "wget", pkg: "wget"}, // Debian's busybox wget has no timeout, and crashes if given one
	{name: "xtables-legacy-multi", pkg: "iptables", also: []string{
		"ip6tables-legacy", "ip6tables-legacy-restore", "ip6tables-legacy-save",
		"iptables-legacy", "iptables-legacy-restore", "iptables-legacy-save",
		"iptables-xml",
	}},
	// The plain names are the nft variants. In upstream's images a wrapper chooses at the first call, by the variant that
	// the kubelet used. Current kubelets use nft, and a learner can read a plain symlink.
	{name: "xtables-nft-multi", pkg: "iptables", also: []string{
		"ip6tables", "ip6tables-nft", "ip6tables-nft-restore", "ip6tables-nft-save", "ip6tables-restore", "ip6tables-save",
		"iptables", "iptables-nft", "iptables-nft-restore", "iptables-nft-save", "iptables-restore", "iptables-save",
		"iptables-restore-translate", "iptables-translate", "ip6tables-restore-translate", "ip6tables-translate",
		"xtables-monitor",
	}},
}

// programDirs is where this machine's packages install programs. $PATH is not used: a wrapper in a home directory does not
// belong in an image.
var programDirs = []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// locate returns the file of a program of this machine, with symlinks resolved (nc is one into /etc/alternatives).
func locate(name string) (string, bool) {
	for _, dir := range programDirs {
		if file, err := filepath.EvalSymlinks(filepath.Join(dir, name)); err == nil {
			return file, true
		}
	}
	return "", false
}

// checkTools returns an error that names all missing programs and the packages to install.
func checkTools() error {
	var missing []string
	packages := map[string]bool{}
	for _, t := range append([]tool{{name: "busybox", pkg: "busybox-static"}}, tools...) {
		if _, ok := locate(t.name); !ok {
			missing = append(missing, t.name)
			packages[t.pkg] = true
		}
	}
	if len(missing) == 0 {
		return nil
	}
	names := make([]string, 0, len(packages))
	for name := range packages {
		names = append(names, name)
	}
	sort.Strings(names)
	return fmt.Errorf("build images: this machine lacks %s; install with: apt-get install -y %s",
		strings.Join(missing, ", "), strings.Join(names, " "))
}

// toolsTree returns the layer of network tools and their libraries.
func toolsTree() (tree, error) {
	t := tree{}
	link := newLinker()
	var sources []string
	for _, tool := range tools {
		source, ok := locate(tool.name)
		if !ok {
			return nil, checkTools()
		}
		t.copy("/usr/bin/"+tool.name, source, 0o755)
		for _, name := range tool.also {
			t.link("/usr/bin/"+name, tool.name)
		}
		sources = append(sources, source)
	}
	libs, err := link.closure(sources...)
	if err != nil {
		return nil, fmt.Errorf("build images: %w", err)
	}

	// Libraries that are opened at run time, which no file header names.
	loaded, err := extensions(libs)
	if err != nil {
		return nil, fmt.Errorf("build images: %w", err)
	}
	// libnss: part of libc itself since glibc 2.34; libgcc_s: for pthread_cancel.
	for _, name := range []string{"libnss_files.so.2", "libnss_dns.so.2", "libgcc_s.so.1"} {
		for _, dir := range trustedDirs {
			if source, err := filepath.EvalSymlinks(filepath.Join(dir, name)); err == nil {
				loaded = append(loaded, library{Path: merged(filepath.Join(dir, name)), Source: source})
				break
			}
		}
	}
	sources = sources[:0]
	for _, lib := range loaded {
		sources = append(sources, lib.Source)
	}
	more, err := link.closure(sources...)
	if err != nil {
		return nil, fmt.Errorf("build images: %w", err)
	}
	for _, lib := range append(append(libs, loaded...), more...) {
		t.copy(lib.Path, lib.Source, 0o755)
	}

	for at, text := range toolsFiles {
		t.write(at, text, 0o644)
	}
	for _, at := range []string{"/etc/protocols", "/etc/services", "/etc/ethertypes", "/etc/ssl/certs/ca-certificates.crt"} {
		source, err := filepath.EvalSymlinks(at)
		if err != nil {
			return nil, fmt.Errorf("build images: this machine lacks %s; install with: apt-get install -y netbase ca-certificates", at)
		}
		t.copy(at, source, 0o644)
	}
	return t, nil
}

// toolsFiles are the small files that the tools read.
var toolsFiles = map[string]string{
	"/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: files\n",
}

// extensions returns iptables' matches and targets, which it loads by name from the directory xtables beside libxtables.
func extensions(libs []library) ([]library, error) {
	for _, lib := range libs {
		if !strings.HasPrefix(filepath.Base(lib.Path), "libxtables.so") {
			continue
		}
		files, err := filepath.Glob(filepath.Join(filepath.Dir(lib.Source), "xtables", "*.so"))
		if err != nil {
			return nil, err
		}
		if len(files) == 0 {
			return nil, fmt.Errorf("find iptables' extensions: no *.so in %s/xtables; reinstall the package iptables", filepath.Dir(lib.Source))
		}
		var found []library
		for _, file := range files {
			source, err := filepath.EvalSymlinks(file)
			if err != nil {
				return nil, fmt.Errorf("find iptables' extensions: %w", err)
			}
			found = append(found, library{
				Path:   filepath.Join(filepath.Dir(lib.Path), "xtables", filepath.Base(file)),
				Source: source,
			})
		}
		return found, nil
	}
	return nil, nil // a statically linked iptables contains them
}

// busybox describes the machine's busybox.
type busybox struct {
	source  string
	version string // 1.35.0
	applets []string
}

// findBusybox asks the machine's busybox for its version and applets.
func findBusybox() (busybox, error) {
	source, ok := locate("busybox")
	if !ok {
		return busybox{}, checkTools()
	}
	// It becomes the image busybox, which has no libraries.
	libs, err := newLinker().closure(source)
	if err != nil {
		return busybox{}, fmt.Errorf("build images: %w", err)
	}
	if len(libs) > 0 {
		return busybox{}, fmt.Errorf("build images: %s is dynamically linked: it needs %s; install with: apt-get install -y busybox-static", source, libs[0].Path)
	}
	banner, err := exec.Command(source, "--help").CombinedOutput()
	if err != nil {
		return busybox{}, fmt.Errorf("build images: ask %s for its version: %w", source, err)
	}
	version := regexp.MustCompile(`BusyBox v(\d+\.\d+\.\d+)`).FindSubmatch(banner)
	if version == nil {
		return busybox{}, fmt.Errorf("build images: %s --help does not begin with BusyBox and its version", source)
	}
	list, err := exec.Command(source, "--list").Output()
	if err != nil {
		return busybox{}, fmt.Errorf("build images: ask %s for its applets: %w", source, err)
	}
	return busybox{source: source, version: string(version[1]), applets: strings.Fields(string(list))}, nil
}

// busyboxTree returns the first layer of nearly every image: a shell, the usual commands, and what programs expect of a
// root directory.
//
// All commands are symlinks in one directory: directories are what a node's copy of the images costs, since regular files
// and symlinks are hard linked and directories cannot be.
func busyboxTree(b busybox) tree {
	t := tree{}
	t.copy("/usr/bin/busybox", b.source, 0o755)
	for _, applet := range b.applets {
		if applet != "busybox" {
			t.link("/usr/bin/"+applet, "busybox")
		}
	}
	t.link("/bin", "usr/bin")
	t.link("/sbin", "usr/bin")
	t.link("/usr/sbin", "bin")
	t.link("/lib", "usr/lib")
	t.link("/lib64", "usr/lib64")
	t.dir("/root", 0o700)
	t.dir("/tmp", 0o777|os.ModeSticky)
	t.link("/var/run", "../run")
	t.dir("/run", 0o755)
	t.write("/etc/passwd", passwd, 0o644)
	t.write("/etc/group", group, 0o644)
	return t
}

// Users. tcpdump switches to its own user, and fails without it. nonroot is the user of CoreDNS's image. Upstream's
// end-to-end tests of agnhost need the last one.
const (
	passwd = `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/:/bin/false
bin:x:2:2:bin:/bin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
tcpdump:x:72:72:tcpdump:/:/bin/false
user-defined-in-image:x:1000:1000:Linux User,,,:/:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
nonroot:x:65532:65532:nonroot:/:/bin/sh
`
	group = `root:x:0:
daemon:x:1:
bin:x:2:
www-data:x:33:
tcpdump:x:72:
user-defined-in-image:x:1000:
group-defined-in-image:x:50000:user-defined-in-image
nogroup:x:65533:
nobody:x:65534:
nonroot:x:65532:
`
)
