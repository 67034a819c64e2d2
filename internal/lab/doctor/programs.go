package doctor

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/fathom-network/fathom/internal/kit"
)

// program is a program of the host that nodes use: a node's root file system is the host's, under an overlay. The kit may
// contain it as well.
type program struct {
	name   string
	needed func(o Options) bool
	pkg    string // the package that has it on most distributions
	why    string // what does not work without it
}

var (
	always = func(Options) bool { return true }
	never  = func(Options) bool { return false }
)

var hostPrograms = []program{
	{"mount", always, "mount", "kubelet cannot mount volumes"},
	{"umount", always, "mount", "kubelet cannot unmount volumes"},
	{"nft", func(o Options) bool { return o.NeedNFTables }, "nftables", "kube-proxy's mode nftables does not work"},
	{"iptables", func(o Options) bool { return o.NeedIPTables }, "iptables", "kube-proxy's modes iptables and ipvs do not work"},
	{"iptables-restore", func(o Options) bool { return o.NeedIPTables }, "iptables", "kube-proxy's modes iptables and ipvs do not work"},
	{"ipset", func(o Options) bool { return o.NeedIPVS }, "ipset", "kube-proxy's mode ipvs does not work"},
	{"ip", never, "iproute2", "links and routes cannot be inspected from a node"},
	{"conntrack", never, "conntrack", "connections cannot be inspected from a node"},
	{"ethtool", never, "ethtool", "devices' settings cannot be inspected from a node"},
	{"modprobe", never, "kmod", "missing kernel modules cannot be loaded by command"},
}

func (e *exam) programs(context.Context) {
	k, err := e.openKit()
	if err != nil {
		found, remedy, told := strings.Cut(err.Error(), "; ")
		if !told {
			remedy = "build it with `make kit`, or set $" + kit.Env + " to where it is"
		}
		e.fail(programs, "kit", found, remedy)
	} else {
		e.have(true, programs, "kit", fmt.Sprintf("Kubernetes %s, containerd %s, etcd %s in %s", k.Kubernetes, k.Containerd, k.Etcd, k.Dir))
	}
	for _, p := range hostPrograms {
		needed := p.needed(e.Options)
		if e.Quick && !needed {
			continue
		}
		path, err := exec.LookPath(p.name)
		if err != nil && k.Dir != "" {
			path, err = exec.LookPath(filepath.Join(k.BinDir(), p.name))
		}
		if err != nil {
			e.miss(needed, programs, p.name, "not found in $PATH: "+p.why, "install the package "+p.pkg)
			continue
		}
		e.have(needed, programs, p.name, path)
	}
}

func (e *exam) openKit() (kit.Kit, error) {
	if e.KitDir != "" {
		return kit.Open(e.KitDir)
	}
	return kit.Find()
}

// kitTime returns when the kit was built, as seconds since 1970, or 0.
func (e *exam) kitTime() int64 {
	k, err := e.openKit()
	if err != nil {
		return 0
	}
	st, err := os.Stat(filepath.Join(k.Dir, "kit.json"))
	if err != nil {
		return 0
	}
	return st.ModTime().Unix()
}
