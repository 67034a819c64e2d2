// Package lab runs labs: clusters of machines with wires between them and Kubernetes on top. It brings
// them up and takes them down, from whatever state an interrupted run left behind.
//
// What a lab is stands in its state directory; what of it is running stands in the kernel, and is always
// asked there: processes by cgroup, wires by namespace and alias, never by a file that remembers them.
package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/kit"
)

// Paths are where labs keep what they need.
type Paths struct {
	State string // the labs: their definitions and their nodes' disks
	Cache string // what is made once for all labs; hard links from it need the same file system as State
	Run   string // what does not survive a reboot: network namespaces
}

// DefaultPaths are the usual places. $FATHOM_STATE moves the first two, to a disk with more room.
func DefaultPaths() Paths {
	p := Paths{State: "/var/lib/fathom", Cache: "/var/cache/fathom", Run: "/run/fathom"}
	if dir := os.Getenv("FATHOM_STATE"); dir != "" {
		p.State, p.Cache = dir, filepath.Join(dir, "cache")
	}
	return p
}

// Lab is a lab that exists, running or not.
type Lab struct {
	topology.Lab
	Paths Paths
	Kit   kit.Kit
	// damage is why the lab's definition was read from its copy.
	damage error
}

// cgroupRoot is the group that all labs are in.
const cgroupRoot = "fathom"

// NotFoundError says that a lab, cluster or node is not there, and which are.
type NotFoundError struct {
	Kind, Name string
	Have       []string
	Hint       string
}

func (e *NotFoundError) Error() string {
	msg := fmt.Sprintf("there is no %s %q", e.Kind, e.Name)
	if len(e.Have) > 0 {
		msg += ": there is " + strings.Join(e.Have, ", ")
	}
	if e.Hint != "" {
		msg += "; " + e.Hint
	}
	return msg
}

// IsNotFound says whether err is about a lab, cluster or node that is not there.
func IsNotFound(err error) bool {
	var e *NotFoundError
	return errors.As(err, &e)
}

// Open reads the lab of that name. If its definition is damaged or lost, that is read which was written when a cluster
// of it had been built; Up then mends the file.
func Open(paths Paths, name string) (*Lab, error) {
	if !topology.IsName(name) {
		return nil, notFound(paths, name)
	}
	l := &Lab{Lab: topology.Lab{Name: name}, Paths: paths}
	data, err := os.ReadFile(l.dir(definition))
	if err == nil {
		var facts topology.Lab
		if facts, err = topology.Decode(data, name); err != nil {
			err = &DamagedError{name, err}
		} else {
			l.Lab = facts
		}
	}
	if err != nil && (IsDamaged(err) || errors.Is(err, fs.ErrNotExist)) {
		copied, found := l.fromMarks()
		switch {
		case found:
			l.Lab, l.damage, err = copied, err, nil
		case errors.Is(err, fs.ErrNotExist):
			return nil, notFound(paths, name)
		}
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("open lab %s: %w: run it with sudo", name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open lab %s: %w", name, err)
	}
	// The kit is needed to start programs, not to look at or to end a lab.
	l.Kit, _ = kit.Find()
	return l, nil
}

func notFound(paths Paths, name string) error {
	have, err := Names(paths)
	if err != nil {
		return err
	}
	return &NotFoundError{Kind: "lab", Name: name, Have: have, Hint: "start one with `fathom up`"}
}

// DamagedError says that a lab's definition cannot be read, and that there is no copy of it.
type DamagedError struct {
	Name string
	Err  error
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("its definition is damaged, take it down with `fathom down --name %s`: %v", e.Name, e.Err)
}

func (e *DamagedError) Unwrap() error { return e.Err }

// IsDamaged says whether err is about a lab whose definition cannot be read.
func IsDamaged(err error) bool {
	var e *DamagedError
	return errors.As(err, &e)
}

// openAll opens every lab that there is, but for those that cannot be read, which say so themselves.
func openAll(paths Paths) ([]*Lab, error) {
	names, err := Names(paths)
	if err != nil {
		return nil, err
	}
	var all []*Lab
	for _, name := range names {
		if l, err := Open(paths, name); err == nil {
			all = append(all, l)
		}
	}
	return all, nil
}

// Names returns the names of the labs that there are, also of those that were only begun.
func Names(paths Paths) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(paths.State, "labs"))
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("list labs: %w: run it with sudo", err)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list labs: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// StateDir is the directory that all of the lab is in that lies on a disk.
func (l *Lab) StateDir() string { return l.dir() }

func (l *Lab) dir(parts ...string) string {
	return filepath.Join(append([]string{l.Paths.State, "labs", l.Name}, parts...)...)
}

func (l *Lab) netnsPath(name string) string {
	return filepath.Join(l.Paths.Run, l.Name, "netns", name)
}

func (l *Lab) cgroup(parts ...string) string {
	return filepath.Join(append([]string{cgroupRoot, l.Name}, parts...)...)
}

const (
	definition = "lab.json"
	marks      = "built" // a directory with a file for each cluster
)

// makePrivate makes the directory of all labs, in which are keys of clusters and control sockets of nodes, root's alone. The
// directory above it may be the user's choice ($FATHOM_STATE), and stays as it is.
func makePrivate(paths Paths) error {
	dir := filepath.Join(paths.State, "labs")
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = os.Chmod(dir, 0o700)
	}
	if err != nil {
		return fmt.Errorf("make the directory of labs: %w", err)
	}
	return nil
}

// save writes the lab's definition. It is what makes a lab exist.
func (l *Lab) save() error {
	if err := makePrivate(l.Paths); err != nil {
		return err
	}
	data, err := topology.Record(&l.Lab)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(l.dir(definition), data, 0o600); err != nil {
		return fmt.Errorf("write down what lab %s is: %w", l.Name, err)
	}
	return nil
}

// writeFile replaces a file of a node in one step, for programs that read it there. It is not synced: a cluster is
// made of thousands of files, most of them by other programs, and setBuilt syncs them all.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if _, err = tmp.Write(data); err == nil {
		err = tmp.Chmod(mode)
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// BusyError says that another command is at work on the lab.
type BusyError struct{ Name, Holder string }

func (e *BusyError) Error() string {
	return fmt.Sprintf("another fathom command (%s) is at work on lab %s: wait for it to end", e.Holder, e.Name)
}

// lock keeps other commands from changing the lab of that name until the returned function is called. The
// kernel drops the lock of a process that ends, however it ends.
func lock(paths Paths, name string) (func(), error) {
	// Not in the lab's own directory, which `down` takes away while it holds the lock.
	dir := filepath.Join(paths.State, "locks")
	path := filepath.Join(dir, name)
	for {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("lock lab %s: %w", name, err)
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the last command of another lab removed the directory, since it was empty
		}
		if err != nil {
			return nil, fmt.Errorf("lock lab %s: %w", name, err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			holder, _ := os.ReadFile(path)
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, &BusyError{Name: name, Holder: strings.TrimSpace(string(holder))}
			}
			return nil, fmt.Errorf("lock lab %s: %w", name, err)
		}
		// The holder before us may have removed the file between our open and our lock.
		var opened, there unix.Stat_t
		if unix.Fstat(int(f.Fd()), &opened) != nil || unix.Stat(path, &there) != nil || opened.Ino != there.Ino {
			f.Close()
			continue
		}
		_ = f.Truncate(0)
		_, _ = fmt.Fprintf(f, "process %d\n", os.Getpid())
		return func() {
			os.Remove(path)
			f.Close()
			removeEmpty(dir, filepath.Join(paths.State, "labs"), paths.State)
		}, nil
	}
}

// lockDir waits until no other command has the directory locked, and locks it. A directory is locked where a
// lock file could be left behind by a command that is killed, or would be one file more to explain.
func lockDir(dir string) (func(), error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return lockDir(dir) // removed since, as it was empty
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		d.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { d.Close() }, nil
}

// Cluster returns the cluster of that name; the empty name is the first cluster.
func (l *Lab) Cluster(name string) (*topology.Cluster, error) {
	var have []string
	for i := range l.Clusters {
		if name == "" || l.Clusters[i].Name == name {
			return &l.Clusters[i], nil
		}
		have = append(have, l.Clusters[i].Name)
	}
	return nil, &NotFoundError{Kind: "cluster", Name: name, Have: have}
}

// Node returns the node of that name and its cluster.
func (l *Lab) Node(name string) (*topology.Cluster, *topology.Node, error) {
	var have []string
	for i := range l.Clusters {
		c := &l.Clusters[i]
		for j := range c.Nodes {
			if c.Nodes[j].Name == name {
				return c, &c.Nodes[j], nil
			}
			have = append(have, c.Nodes[j].Name)
		}
	}
	return nil, nil, &NotFoundError{Kind: "node", Name: name, Have: have}
}

// Machine returns the running machine of a node; see machine.ErrNotRunning.
func (l *Lab) Machine(node string) (*machine.Machine, error) {
	m, err := machine.Open(l.cgroup(node))
	if errors.Is(err, machine.ErrNotRunning) {
		return nil, fmt.Errorf("node %w: start it with `fathom node start --name %s %s`", err, l.Name, node)
	}
	return m, err
}

// Context is the name of a cluster's context in a kubeconfig.
func (l *Lab) Context(c *topology.Cluster) string { return l.Name + "-" + c.Name }

// AdminKubeconfig returns the path of the cluster's admin.conf, as the host sees it.
func (l *Lab) AdminKubeconfig(c *topology.Cluster) string {
	return l.diskFile(c.Nodes[0].Name, "/etc/kubernetes/admin.conf")
}

// KubectlCache is where kubectl keeps what it learns of a lab's API servers. In the user's home, where it is by
// default, it would outlive the lab.
func (l *Lab) KubectlCache() string { return l.dir("kubectl-cache") }

// diskFile returns where the host finds a file that was written on a node's disk. It is for reading, and
// for writing while the node is off; a running node sees its disk through an overlay.
func (l *Lab) diskFile(node, path string) string {
	if rest, found := strings.CutPrefix(path, "/var/"); found {
		return l.dir("nodes", node, "var", rest)
	}
	return l.dir("nodes", node, "upper", path)
}

// built says whether the cluster was once brought up to its end. One that was not is begun anew.
func (l *Lab) built(c *topology.Cluster) bool {
	_, err := os.Stat(l.dir(marks, c.Name))
	return err == nil
}

// setBuilt marks the cluster as built. The mark outlives a power cut, so what it speaks of has to be on the disk before
// it: certificates and manifests, which kubeadm does not sync. It holds the lab's definition, for a lab whose own is
// damaged.
func (l *Lab) setBuilt(c *topology.Cluster) error {
	if err := durable.SyncAll(l.dir()); err != nil {
		return fmt.Errorf("have the disks of cluster %s written: %w", c.Name, err)
	}
	data, err := topology.Record(&l.Lab)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(l.dir(marks, c.Name), data, 0o600); err != nil {
		return fmt.Errorf("mark cluster %s as built: %w", c.Name, err)
	}
	return nil
}

// fromMarks reads the definition from a mark.
func (l *Lab) fromMarks() (topology.Lab, bool) {
	entries, err := os.ReadDir(l.dir(marks))
	if err != nil {
		return topology.Lab{}, false
	}
	for _, e := range entries {
		data, err := os.ReadFile(l.dir(marks, e.Name()))
		if err != nil {
			continue
		}
		if facts, err := topology.Decode(data, l.Name); err == nil {
			return facts, true
		}
	}
	return topology.Lab{}, false
}

// begun says whether no cluster of the lab was ever built, so that nothing is lost with its definition.
func (l *Lab) begun() bool {
	entries, err := os.ReadDir(l.dir(marks))
	return len(entries) == 0 && (err == nil || errors.Is(err, fs.ErrNotExist))
}

// mend moves a damaged definition aside and says so. What takes its place was read from a mark, or is new.
func (l *Lab) mend(t *timeline) error {
	if l.damage == nil {
		return nil
	}
	step := fmt.Sprintf("replace %s, which was lost", l.dir(definition))
	if IsDamaged(l.damage) {
		step = fmt.Sprintf("replace %s, which was damaged and is kept as %s%s", l.dir(definition), definition, durable.Damaged)
	}
	return t.step("", step, func() error {
		_, err := durable.SetAside(l.dir(definition))
		return err
	})
}

func (l *Lab) nodeNames() []string {
	var names []string
	for _, c := range l.Clusters {
		for _, n := range c.Nodes {
			names = append(names, n.Name)
		}
	}
	slices.Sort(names)
	return names
}
