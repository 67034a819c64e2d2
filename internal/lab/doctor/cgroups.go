package doctor

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
)

// The purposes of the controllers. kubelet starts only with those that are needed.
var controllers = []struct {
	name   string
	v1only bool
	needed bool
	why    string
}{
	{"cpu", false, true, "kubelet does not start"},
	{"cpuacct", true, true, "kubelet does not start"},
	{"cpuset", false, true, "kubelet does not start"},
	{"memory", false, true, "kubelet does not start"},
	{"pids", false, true, "the processes of pods cannot be limited"},
	{"devices", true, true, "runc starts no container"},
	{"freezer", true, true, "the processes of a node cannot be stopped together"},
	{"io", false, false, "pods' disk use is neither counted nor limited"},
	{"hugetlb", false, false, "pods cannot ask for huge pages"},
}

func (e *exam) cgroups(context.Context) {
	all, mode, err := cgroup.Hierarchies()
	if err != nil || len(all) == 0 {
		e.fail(cgroups, "cgroups", "no cgroup file system is mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup")
		return
	}
	e.have(true, cgroups, "mode", string(mode))
	e.controllers(mode, all)
}

// controllers checks that each controller exists, in the v2 hierarchy or mounted as v1.
func (e *exam) controllers(mode cgroup.Mode, all []cgroup.Hierarchy) {
	var have []string
	for _, h := range all {
		if h.V2 {
			have = append(have, strings.Fields(e.host.read(filepath.Join(h.Path, "cgroup.controllers")))...)
		} else {
			have = append(have, strings.Split(h.Options, ",")...)
		}
	}
	if slices.Contains(have, "blkio") {
		have = append(have, "io") // its name in v1
	}
	var found []string
	for _, c := range controllers {
		switch {
		case c.v1only && mode == cgroup.V2:
		case slices.Contains(have, c.name):
			found = append(found, c.name)
		case e.Quick && !c.needed:
		default:
			e.miss(c.needed, cgroups, "cgroup "+c.name, "no such controller: "+c.why, controllerRemedy(mode, c.name, e.host.read("/proc/cgroups")))
		}
	}
	e.have(true, cgroups, "controllers", strings.Join(found, ", "))
	if mode == cgroup.V2 {
		e.delegation(all[0].Path)
	}
}

// delegation checks that groups below the mounted one can use the controllers. In a container, the mounted cgroup is the
// container's. Unlike the root, it is not exempt from the rule against processes in inner groups: cgroup-v2.rst, "No
// Internal Process Constraint".
func (e *exam) delegation(dir string) {
	if !e.host.exists(filepath.Join(dir, "cgroup.type")) || e.host.read(filepath.Join(dir, "cgroup.procs")) == "" {
		return
	}
	handed := strings.Fields(e.host.read(filepath.Join(dir, "cgroup.subtree_control")))
	for _, c := range controllers {
		if c.needed && !c.v1only && !slices.Contains(handed, c.name) {
			e.fail(cgroups, "delegation", "the processes of this container are in the cgroup that labs would be in: nodes get no controllers",
				fmt.Sprintf("mkdir %[1]s/init && xargs -rn1 <%[1]s/cgroup.procs >%[1]s/init/cgroup.procs", dir))
			return
		}
	}
}

// controllerRemedy finds out from the text of /proc/cgroups why a controller is missing.
func controllerRemedy(mode cgroup.Mode, name, table string) string {
	if name == "io" {
		name = "blkio"
	}
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 4 || f[0] != name {
			continue
		}
		switch {
		case f[3] == "0":
			return "start the kernel with cgroup_enable=" + name
		case mode == cgroup.V2:
			return fmt.Sprintf("enable it for this cgroup: write +%s to cgroup.subtree_control of its parent", name)
		default:
			return fmt.Sprintf("mount it: mkdir /sys/fs/cgroup/%s && mount -t cgroup -o %s cgroup /sys/fs/cgroup/%s", name, name, name)
		}
	}
	return "this kernel was built without it"
}
