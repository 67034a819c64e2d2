package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/lab/image"
	"github.com/fathom-network/fathom/internal/lab/saved"
	"github.com/fathom-network/fathom/internal/lab/stored"
)

// RestoreOptions say how a lab begins with a file.
type RestoreOptions struct {
	// Name is the lab's; empty for the one that it had.
	Name string
	// Replace has it take the place of the lab of that name, if there is one.
	Replace bool
	// Underlay4 and Underlay6 are where nodes have their addresses, if they are valid.
	Underlay4, Underlay6 netip.Prefix
	// HostPaths lets nodes see the paths of this machine that the file names. A file may be anybody's.
	HostPaths bool
}

// origin is the file that a lab begins with, until all of it is built.
const origin = "origin.tar.zst"

// Restore brings up a lab that begins with a file. It has the underlay that it had, if it is not given another one and nothing else has it. What a file has no secrets of is made
// anew, and so are the keys of a lab that goes by another name.
func Restore(ctx context.Context, paths Paths, from string, o RestoreOptions, report Report) (*Lab, error) {
	t := &timeline{report: report}
	h, err := saved.Check(from) // before anything is changed
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", from, err)
	}
	want := h.Lab
	if o.Name != "" {
		want.Name = o.Name
	}
	if o.Underlay4.IsValid() {
		want.Underlay4 = o.Underlay4
	}
	if o.Underlay6.IsValid() {
		want.Underlay6 = o.Underlay6
	}
	if !topology.IsName(want.Name) {
		return nil, fmt.Errorf("begin a lab with %s: %q is no name of a lab", from, want.Name)
	}
	if host := h.HostPaths(); len(host) > 0 && !o.HostPaths {
		return nil, fmt.Errorf("begin a lab with %s: its nodes are to see %s of this machine: allow it with --host-paths, if you trust who made the file", from, strings.Join(host, ", "))
	}
	k, err := kit.Find()
	if err != nil {
		return nil, err
	}
	if h.Kubernetes != k.Kubernetes {
		return nil, fmt.Errorf("begin a lab with %s: it is of Kubernetes %s, and this kit has %s: use the fathom that made it (%s)", from, h.Kubernetes, k.Kubernetes, h.Fathom)
	}
	unlock, err := lock(paths, want.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	old := &Lab{Lab: topology.Lab{Name: want.Name}, Paths: paths}
	if old.traces() {
		// What an interrupted start left before there was a lab is nobody's.
		if _, err := Open(paths, want.Name); !o.Replace && !IsNotFound(err) {
			return nil, fmt.Errorf("%w: take it down with `fathom down --name %s`, or give the new one another --name", ErrExists, want.Name)
		}
		if err := old.down(ctx, t); err != nil {
			return nil, err
		}
	}
	l, err := begin(ctx, paths, &want, from, func(p netip.Prefix) bool { return p != o.Underlay4 && p != o.Underlay6 }, t)
	if err != nil {
		return nil, err
	}
	return l.finish(ctx, false, t)
}

// ErrExists says that a lab of the name is there.
var ErrExists = errors.New("a lab of this name exists")

// restored is what a lab begins with.
type restored struct {
	*saved.File
	images []saved.Loaded
}

// openOrigin lays the file that the lab begins with out on the disks of the nodes of clusters that are not built. There is none for other labs.
func (l *Lab) openOrigin(ctx context.Context, store image.Store) (*restored, error) {
	f, err := saved.Open(l.dir(origin))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what lab %s begins with: %w", l.Name, err)
	}
	defer f.Close()
	nodes := map[string]saved.Node{}
	var disks errgroup.Group
	disks.SetLimit(bootLimit)
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if l.built(c) {
			continue
		}
		move := l.identityThen(f, c).Move(l.identityNow(nil))
		for j := range c.Nodes {
			n := &c.Nodes[j]
			nodes[n.Name] = saved.Node{Places: l.places(n.Name), Move: move}
			disks.Go(func() error {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := l.writeDisk(c, n, store); err != nil {
					return err
				}
				for _, p := range l.places(n.Name) {
					if err := os.MkdirAll(p.Host, 0o755); err != nil {
						return err
					}
				}
				return nil
			})
		}
	}
	if err := disks.Wait(); err != nil {
		return nil, err
	}
	dir := l.dir(imagesOfOrigin)
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	r := &restored{File: f}
	if r.images, err = f.Unpack(nodes, dir); err != nil {
		return nil, fmt.Errorf("lay out the nodes' disks: %w", err)
	}
	return r, nil
}

// imagesOfOrigin is the directory that archives of images are in until nodes have them.
const imagesOfOrigin = "origin-images"

// closeOrigin forgets what the lab began with.
func (l *Lab) closeOrigin() error {
	return errors.Join(os.RemoveAll(l.dir(imagesOfOrigin)), os.RemoveAll(l.dir(origin)))
}

// identityThen and identityNow are what a cluster had for itself when it was saved, and what it has now.
func (l *Lab) identityThen(f *saved.File, c *topology.Cluster) stored.Identity {
	return stored.Identity{Underlay4: f.Lab.Underlay4, Underlay6: f.Lab.Underlay6, Public: f.Clusters[c.Name].Public}
}

func (l *Lab) identityNow(public map[string]string) stored.Identity {
	return stored.Identity{Underlay4: l.Underlay4, Underlay6: l.Underlay6, Public: public}
}

// restore makes a cluster that goes on as it was.
func (a *assembly) restore(ctx context.Context, r *restored) error {
	was := r.Clusters[a.c.Name]
	begins := func() (beginning, error) {
		var keys *stored.Keys
		var err error
		same := len(was.Keys) > 0 && r.Lab.Name == a.Name
		if same {
			keys, err = stored.ReadKeys(was.Planes, func(name string) ([]byte, error) {
				data, ok := was.Keys[name]
				if !ok {
					return nil, fmt.Errorf("the file has no %s", name)
				}
				return data, nil
			})
		} else {
			keys, err = stored.NewKeys(was.Planes)
		}
		if err != nil {
			return beginning{}, err
		}
		from, to := a.identityThen(r.File, a.c), a.identityNow(keys.Public())
		var b beginning
		if b.state, err = was.Begin(from, to, same); err != nil {
			return beginning{}, err
		}
		if !same {
			now := time.Now()
			if err := b.state.AddSecret(bootstrapToken(now), now); err != nil {
				return beginning{}, err
			}
		}
		b.files = map[string]map[string][]byte{}
		for name, disk := range was.Planes {
			if b.files[name], err = disk.Personalize(from, to, keys); err != nil {
				return beginning{}, fmt.Errorf("node %s: %w", name, err)
			}
		}
		return b, nil
	}
	since := since{}
	for _, n := range a.nodes {
		since[n.Name] = time.Now()
	}
	boot := func(ctx context.Context, n *node) (err error) {
		n.Machine, err = a.boot(ctx, a.c, n.Node)
		return err
	}
	images := func(ctx context.Context) error { return a.loadImages(ctx, r) }
	if err := a.begin(ctx, "make the cluster of what was saved", begins, boot, images); err != nil {
		return err
	}
	a.manifests.apply(a.c, a.client, nil)
	if err := concurrently(ctx, a.waitProxy, func(ctx context.Context) error { return a.waitUsable(ctx, since) }); err != nil {
		return err
	}
	for _, n := range a.nodes {
		if slices.Contains(r.Cut, n.Name) {
			if err := a.CutWire(n.Name); err != nil {
				return err
			}
		}
	}
	return a.setBuilt(a.c)
}

// loadImages gives the nodes the images that they had.
func (a *assembly) loadImages(ctx context.Context, r *restored) error {
	if len(r.images) == 0 {
		return nil
	}
	return a.step(fmt.Sprintf("load %d image%s", len(r.images), plural(len(r.images))), func() error {
		for _, i := range r.images {
			var to []image.Target
			for _, n := range a.nodes {
				if slices.Contains(i.Nodes, n.Name) {
					if err := waitService(ctx, n.Machine, containerdService); err != nil {
						return err
					}
					to = append(to, image.Target{Name: n.Name, SocketPath: n.File(ContainerdSocket)})
				}
			}
			if len(to) == 0 {
				continue
			}
			if _, _, err := image.Load(ctx, a.Kit, []string{i.Archive}, image.Input{Dir: a.StateDir()}, to); err != nil {
				return err
			}
		}
		return nil
	})
}

// placeOrigin copies the file that the lab begins with to where an interrupted start finds it again.
func (l *Lab) placeOrigin(from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := durable.Write(l.dir(origin), f, 0o600); err != nil {
		return fmt.Errorf("keep what lab %s begins with: %w", l.Name, err)
	}
	return nil
}
