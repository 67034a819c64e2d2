package image

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sort"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fathom-network/fathom/deploy"
	"github.com/fathom-network/fathom/internal/facts/standin"
	"github.com/fathom-network/fathom/internal/kit"
)

// The layers. They are stacked in this order and shared, so that each is unpacked and stored once: every image with the
// Kubernetes programs has the tools below them, although only kube-proxy needs those. Rejected: distroless images like
// upstream's, which would store one of the two twice and lack a shell to look around with.
const (
	layerBusybox = "busybox"    // a shell and the root directory
	layerTools   = "tools"      // network tools and their libraries
	layerKube    = "kubernetes" // the multi-call binary of Kubernetes and etcd
	layerCoreDNS = "coredns"
	layerAgnhost = "agnhost"
	layerToolbox = "toolbox"
	layerFlannel = "flannel"     // flanneld
	layerPlugin  = "flannel-cni" // flannel's CNI plugin
	layerPause   = "pause"
	layerAgent   = "fathom-agent"
	layerDNS     = "fathom-dns"
)

// The layers of stand-ins: standins.go.
const (
	layerPackages = "packages" // replaces package managers, and says that they install nothing
	layerAlpine   = "alpine"
	layerDebian   = "debian"
	layerCurl     = "curl"
	layerHTTPEcho = "http-echo"
)

// Tags of Kubernetes' end-to-end tests that the kit does not know, from test/utils/image/manifest.go
// of Kubernetes 1.36. A test that asks for another one fails with ErrImageNeverPull or a pull error
// that shows the name.
const (
	e2eBusybox  = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1"
	e2eIptables = "registry.k8s.io/build-image/distroless-iptables:v0.9.6"
	e2eGlibcDNS = "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0"
)

// A recipe describes an image.
type recipe struct {
	names  []string // full names with tags; all of one recipe are the same image
	layers []string
	config v1.Config
	// standIn says what a stand-in for another image really is, for a label; empty for the rest.
	standIn string
}

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// kubePrograms are the names under which an image calls the multi-call binary.
var kubePrograms = []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubeadm", "kubectl", "kubelet"}

// ownPrograms are the programs in the agent's image: the agent, the plugin that it installs on the node, and the
// controller.
var ownPrograms = []string{"fathom-agent", "fathom-cni", "fathom-controller"}

// The images of the network, which are also used outside of a lab: WriteNetwork. The program of the DNS cache's image may
// bind port 53 by the file's capability, as in CoreDNS's image.
var (
	agentRecipe = recipe{
		names:  []string{deploy.Image},
		layers: []string{layerAgent},
		config: v1.Config{Env: []string{searchPath}, Entrypoint: []string{"/fathom-agent"}, WorkingDir: "/"},
	}
	dnsRecipe = recipe{
		names:  []string{deploy.DNSImage},
		layers: []string{layerDNS},
		config: v1.Config{Env: []string{searchPath}, Entrypoint: []string{"/fathom-dns"}, WorkingDir: "/", User: "65532:65532"},
	}
)

// agentTree returns the layer of the agent's image, from the programs in a directory.
func agentTree(dir string) tree {
	t := tree{}
	for _, name := range ownPrograms {
		t.copy("/"+name, filepath.Join(dir, name), 0o755)
	}
	return t
}

// dnsTree returns the layer of the DNS cache's image.
func dnsTree(program string) tree {
	return tree{"/fathom-dns": file{Source: program, Mode: 0o755, Xattrs: map[string]string{"security.capability": capNetBindService}}}
}

// recipes returns all recipes, for the versions of the kit, the machine's busybox and the packages of servers.
func recipes(k kit.Kit, b busybox, s *servers) []recipe {
	base := []string{layerBusybox, layerTools}
	on := func(layers ...string) []string { return append(append([]string(nil), base...), layers...) }
	run := func(command ...string) v1.Config {
		return v1.Config{Env: []string{searchPath}, Entrypoint: command, WorkingDir: "/"}
	}
	call := func(command ...string) v1.Config {
		return v1.Config{Env: []string{searchPath}, Cmd: command, WorkingDir: "/"}
	}
	as := func(user string, config v1.Config) v1.Config {
		config.User = user
		return config
	}

	var all []recipe
	for _, name := range []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		all = append(all, recipe{
			names:  []string{"registry.k8s.io/" + name + ":" + k.Kubernetes},
			layers: on(layerKube),
			config: run("/usr/local/bin/" + name),
		})
	}
	minor := b.version[:strings.LastIndex(b.version, ".")]
	pause := []string{k.PauseImage}
	if k.KubeadmPauseImage != "" && k.KubeadmPauseImage != k.PauseImage {
		pause = append(pause, k.KubeadmPauseImage)
	}
	all = append(all, s.recipes()...)
	if hasHTTPEcho(k) {
		all = append(all, recipe{
			names:   []string{standin.Image("http-echo")},
			standIn: "http-echo " + k.HTTPEcho,
			layers:  []string{layerHTTPEcho},
			config: func() v1.Config {
				c := run("/http-echo")
				c.ExposedPorts = map[string]struct{}{"5678/tcp": {}}
				return c
			}(),
		})
	}
	return append(all,
		recipe{
			names:  []string{"registry.k8s.io/etcd:" + k.EtcdImageTag},
			layers: on(layerKube),
			config: run("/usr/local/bin/etcd"),
		},
		recipe{
			// As upstream's image: the file has the capability to bind port 53, and runs as this user.
			names:  []string{"registry.k8s.io/coredns/coredns:" + k.CoreDNSImageTag},
			layers: on(layerCoreDNS),
			config: as("65532:65532", run("/coredns")),
		},
		recipe{
			names:  pause,
			layers: []string{layerPause},
			config: as("65535:65535", run("/pause")),
		},
		recipe{
			// CoreDNS is below agnhost because upstream's tests run /coredns in agnhost's image.
			names:   []string{"registry.k8s.io/e2e-test-images/agnhost:" + k.Agnhost, standin.Image("agnhost")},
			standIn: "agnhost " + k.Agnhost,
			layers:  on(layerCoreDNS, layerAgnhost),
			config: func() v1.Config {
				c := run("/agnhost")
				c.Cmd = []string{"pause"}
				c.ExposedPorts = map[string]struct{}{"80/tcp": {}, "8080/tcp": {}, "8081/tcp": {}, "9376/tcp": {}, "5000/tcp": {}}
				return c
			}(),
		},
		agentRecipe,
		dnsRecipe,
		recipe{
			names:  []string{"ghcr.io/flannel-io/flannel:" + k.Flannel},
			layers: on(layerFlannel),
			config: run("/opt/bin/flanneld"),
		},
		recipe{
			names:  []string{"ghcr.io/flannel-io/flannel-cni-plugin:" + k.FlannelCNI},
			layers: []string{layerBusybox, layerPlugin},
			config: call("/flannel"),
		},
		recipe{
			// `image: toolbox` means docker.io/library/toolbox:latest, and the tag latest means imagePullPolicy Always
			// unless the manifest says otherwise. `image: toolbox:1` needs nothing more in the manifest.
			names: []string{
				"docker.io/library/toolbox:1", "docker.io/library/toolbox:latest",
				"fathom.network/toolbox:1", "fathom.network/toolbox:latest",
				standin.Image("toolbox"),
			},
			standIn: "the lab's toolbox",
			layers:  on(layerCoreDNS, layerAgnhost, layerToolbox),
			config:  call("/pause"),
		},
		recipe{
			// Tagged with its real version; other tags get it as a stand-in.
			names: []string{
				"docker.io/library/busybox:" + b.version, "docker.io/library/busybox:" + minor,
				"docker.io/library/busybox:1", "docker.io/library/busybox:latest",
				e2eBusybox, standin.Prefix + "busybox:" + b.version,
			},
			standIn: "busybox " + b.version,
			layers:  []string{layerBusybox},
			config:  call("sh"),
		},
		recipe{
			// Both contain only programs that every glibc system has: iptables, and dig and getent.
			names:  []string{e2eIptables, e2eGlibcDNS},
			layers: base,
			config: call("sh"),
		},
		recipe{
			// Courses use the tag busybox:1.28 because its nslookup follows the search list of resolv.conf and later ones
			// do not. BIND's nslookup follows it.
			names:   []string{standin.Image("busybox")},
			standIn: "busybox " + b.version + " and the lab's tools",
			layers:  base,
			config:  call("sh"),
		},
		recipe{
			names:   []string{standin.Image("alpine")},
			standIn: "busybox " + b.version + " and the lab's tools; apk installs nothing",
			layers:  on(layerPackages, layerAlpine),
			config:  call("/bin/sh"),
		},
		recipe{
			names:   []string{standin.Image("debian")},
			standIn: "the programs of this machine's Debian or Ubuntu that the toolbox has; apt installs nothing",
			layers:  on(layerPackages, layerDebian),
			config:  call("/bin/bash"),
		},
		recipe{
			names:   []string{standin.Image("curl")},
			standIn: "this machine's curl",
			layers:  on(layerCurl),
			config: func() v1.Config {
				c := run("/entrypoint.sh")
				c.Cmd = []string{"curl"}
				return c
			}(),
		},
	)
}

// Names returns the names of all local images, sorted.
func Names(k kit.Kit) ([]string, error) {
	b, err := findBusybox()
	if err != nil {
		return nil, err
	}
	s, err := findServers(k)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range recipes(k, b, s) {
		names = append(names, r.names...)
	}
	sort.Strings(names)
	return names, nil
}

// trees returns what each layer holds.
func trees(k kit.Kit, b busybox, s *servers) (map[string]tree, error) {
	needed := []string{k.Bin("kube")}
	for _, name := range []string{"agnhost", "coredns", "fathom-dns", "flannel", "flanneld", "pause"} {
		needed = append(needed, k.Program(name))
	}
	for _, name := range ownPrograms {
		needed = append(needed, k.Own(name))
	}
	certificate := []string{k.Program("localhost.crt"), k.Program("localhost.key")}
	if err := k.Require(append(certificate, needed...)...); err != nil {
		return nil, fmt.Errorf("build images: %w", err)
	}
	for _, file := range needed {
		libs, err := newLinker().closure(file)
		if err != nil {
			return nil, fmt.Errorf("build images: %w", err)
		}
		if len(libs) > 0 {
			return nil, fmt.Errorf("build images: %s is dynamically linked: it needs %s; build the kit with CGO_ENABLED=0", file, libs[0].Path)
		}
	}

	all := map[string]tree{layerBusybox: busyboxTree(b)}
	var err error
	if all[layerTools], err = toolsTree(); err != nil {
		return nil, err
	}

	kube := tree{}
	kube.copy("/usr/local/bin/kube", k.Bin("kube"), 0o755)
	for _, name := range kubePrograms {
		kube.link("/usr/local/bin/"+name, "kube")
	}
	// Further names that the kit gives its multi-call binary, such as etcdctl.
	names, err := filepath.Glob(k.Bin("*"))
	if err != nil {
		return nil, fmt.Errorf("build images: %w", err)
	}
	for _, name := range names {
		if target, err := os.Readlink(name); err == nil && filepath.Base(target) == "kube" {
			kube.link("/usr/local/bin/"+filepath.Base(name), "kube")
		}
	}
	all[layerKube] = kube

	dns := tree{}
	dns["/coredns"] = file{Source: k.Program("coredns"), Mode: 0o755, Xattrs: map[string]string{"security.capability": capNetBindService}}
	all[layerCoreDNS] = dns

	agnhost := tree{}
	agnhost.copy("/agnhost", k.Program("agnhost"), 0o755)
	agnhost.link("/agnhost-2", "agnhost")
	for _, file := range certificate { // agnhost porter's, which upstream's image has here
		agnhost.copy("/"+filepath.Base(file), file, 0o644)
	}
	agnhost.dir("/uploads", 0o755)
	agnhost.link("/usr/local/bin/iperf", "/usr/bin/iperf")
	all[layerAgnhost] = agnhost

	toolbox := tree{}
	toolbox.copy("/pause", k.Program("pause"), 0o755)
	toolbox.link("/usr/bin/agnhost", "/agnhost")
	toolbox.write("/usr/bin/webserver", webserver, 0o755)
	all[layerToolbox] = toolbox

	all[layerAgent] = agentTree(k.OwnDir)
	all[layerDNS] = dnsTree(k.Program("fathom-dns"))

	flanneld := tree{}
	flanneld.copy("/opt/bin/flanneld", k.Program("flanneld"), 0o755)
	all[layerFlannel] = flanneld

	plugin := tree{}
	plugin.copy("/flannel", k.Program("flannel"), 0o755)
	all[layerPlugin] = plugin

	pause := tree{}
	pause.copy("/pause", k.Program("pause"), 0o755)
	all[layerPause] = pause
	if hasHTTPEcho(k) {
		t := tree{}
		t.copy("/http-echo", k.Program("http-echo"), 0o755)
		all[layerHTTPEcho] = t
	}

	maps.Copy(all, standInTrees())
	more, err := s.trees(all[layerTools])
	if err != nil {
		return nil, err
	}
	maps.Copy(all, more)
	return all, nil
}

// capNetBindService is the value of the extended attribute security.capability that `setcap cap_net_bind_service=+ep`
// writes: struct vfs_cap_data, revision 2, effective, permitted 1<<10.
const capNetBindService = "\x01\x00\x00\x02" + "\x00\x04\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00"

const webserver = `#!/bin/sh
# webserver [PORT [DIRECTORY]]: serve a directory over HTTP with busybox httpd.
# Without a directory, it serves one page that says which pod answered.
port=${1:-8080}
dir=$2
if [ -z "$dir" ]; then
	dir=$(mktemp -d) || exit 1
	hostname >"$dir/index.html"
	chmod 755 "$dir"
fi
exec busybox httpd -f -v -p "$port" -h "$dir"
`
