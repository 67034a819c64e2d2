package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/lab/doctor"
	"github.com/fathom-network/fathom/internal/lab/image"
)

// ErrDiffers says that a lab of the name is there and is not the one that was asked for.
var ErrDiffers = errors.New("a lab of this name exists and is another one than you ask for")

// Up brings a lab up and returns when every node is Ready and names resolve. A lab that is there is
// brought to that state from whatever state it is in; clusters that an interrupted Up left half made are
// made anew. want's manifests are applied meanwhile. A cluster begins with the template of those like it, or, if there is none or fresh
// is true, is made the long way.
func Up(ctx context.Context, paths Paths, want *topology.Lab, fresh bool, report Report) (*Lab, error) {
	t := &timeline{report: report}
	unlock, err := lock(paths, want.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	l, err := begin(ctx, paths, want, "", func(netip.Prefix) bool { return false }, t)
	if err != nil {
		return nil, err
	}
	return l.finish(ctx, fresh, t)
}

// finish brings up a lab that exists.
func (l *Lab) finish(ctx context.Context, fresh bool, t *timeline) (*Lab, error) {
	m, stop := l.beginManifests(ctx, t)
	defer stop()
	err := l.up(ctx, m, fresh, t)
	if err == nil {
		err = t.step("", "write the kubeconfig", l.mergeKubeconfig)
	}
	if err != nil {
		return l, err
	}
	return l, m.wait()
}

// begin makes the lab exist, if this machine can run it. Labs begin one at a time, so that no two choose the
// same underlay. from is the file that it begins with, or empty.
func begin(ctx context.Context, paths Paths, want *topology.Lab, from string, moves func(underlay netip.Prefix) bool, t *timeline) (*Lab, error) {
	unlock, err := lockDir(paths.State)
	if err != nil {
		return nil, err
	}
	defer unlock()
	l, err := define(paths, want, moves)
	if err != nil {
		return nil, err
	}
	if err := l.checkContexts(); err != nil {
		return nil, err
	}
	if l.Kit, err = kit.Find(); err != nil {
		return nil, err
	}
	if err := t.step("", "check this machine", func() error { return l.check(ctx) }); err != nil {
		return nil, err
	}
	if err := l.checkKubeconfig(); err != nil {
		return nil, err
	}
	if err := l.mend(t); err != nil {
		return nil, err
	}
	// Before the lab exists: what is there when it does is what it begins with.
	switch _, err := os.Stat(l.dir(definition)); {
	case from != "":
		if err := l.placeOrigin(from); err != nil {
			return nil, err
		}
	case errors.Is(err, fs.ErrNotExist):
		if err := l.closeOrigin(); err != nil {
			return nil, err
		}
	}
	return l, l.save()
}

// define returns the lab to bring up: the one that exists, with want's manifests, or want with an underlay. moves says whether
// want can have another underlay than this one that it names.
func define(paths Paths, want *topology.Lab, moves func(underlay netip.Prefix) bool) (*Lab, error) {
	have, err := Open(paths, want.Name)
	if err == nil {
		if !sameLab(&have.Lab, want) {
			return nil, fmt.Errorf("%w: take it down with `fathom down --name %s`, or give the new one another --name", ErrDiffers, want.Name)
		}
		for i := range have.Clusters {
			have.Clusters[i].Manifests = want.Clusters[i].Manifests
		}
		return have, nil
	}
	l := &Lab{Lab: *want, Paths: paths}
	switch {
	case IsNotFound(err):
	case IsDamaged(err) && l.begun():
		l.damage = err
	default:
		return nil, err
	}
	taken, err := takenPrefixes(paths, l)
	if err != nil {
		return nil, err
	}
	for _, underlay := range []*netip.Prefix{&l.Underlay4, &l.Underlay6} {
		for _, p := range taken {
			if !underlay.IsValid() || !p.IsValid() || !underlay.Overlaps(p) {
				continue
			}
			if moves(*underlay) {
				*underlay = netip.Prefix{}
			} else {
				return nil, fmt.Errorf("the underlay %s overlaps %s, which this machine routes, another lab has or the lab's own clusters use: choose another, or leave it out", underlay, p)
			}
		}
	}
	v4, v6, err := topology.ChooseUnderlay(taken)
	if err != nil {
		return nil, err
	}
	if !l.Underlay4.IsValid() {
		l.Underlay4 = v4
	}
	if !l.Underlay6.IsValid() {
		l.Underlay6 = v6
	}
	return l, nil
}

// sameLab compares what a user asks for with what is there; an underlay that was left open matches any.
func sameLab(have, want *topology.Lab) bool {
	w := *want
	if !w.Underlay4.IsValid() {
		w.Underlay4 = have.Underlay4
	}
	if !w.Underlay6.IsValid() {
		w.Underlay6 = have.Underlay6
	}
	a, errA := json.Marshal(have)
	b, errB := json.Marshal(&w)
	return errA == nil && errB == nil && bytes.Equal(a, b)
}

// takenPrefixes are the ranges that a new lab's underlay must not overlap: the host's routes, the other
// labs' underlays (they may be down) and the lab's own clusters.
func takenPrefixes(paths Paths, l *Lab) ([]netip.Prefix, error) {
	taken := l.Prefixes()
	host, err := openHost()
	if err != nil {
		return nil, err
	}
	defer host.Close()
	routed, err := host.Routed()
	if err != nil {
		return nil, err
	}
	for _, p := range routed {
		if p.Bits() > 0 {
			taken = append(taken, p)
		}
	}
	others, err := openAll(paths)
	if err != nil {
		return nil, err
	}
	for _, other := range others {
		taken = append(taken, other.Underlay4, other.Underlay6)
	}
	return taken, nil
}

// check runs the parts of doctor that this lab needs.
func (l *Lab) check(ctx context.Context) error {
	o := doctor.For(&l.Lab)
	// What runs has what it takes.
	for i := range l.Clusters {
		c := &l.Clusters[i]
		for j := range c.Nodes {
			n := &c.Nodes[j]
			if _, err := machine.Open(l.cgroup(n.Name)); err != nil {
				if err := l.checkBinds(c, n); err != nil {
					return err
				}
				continue
			}
			o.Nodes--
			if n.Role == topology.ControlPlane {
				o.ControlPlanes--
			}
		}
	}
	o.StateDir, o.KitDir, o.Quick = l.Paths.State, l.Kit.Dir, true
	return doctor.Failed(doctor.Run(ctx, o))
}

// checkBinds looks for what the node is to see of the host. The lab file was checked when it was read, which may be long ago.
func (l *Lab) checkBinds(c *topology.Cluster, n *topology.Node) error {
	for _, b := range l.spec(c, n, "").Binds {
		if _, err := os.Stat(b.Source); err != nil {
			return fmt.Errorf("node %s is to see a path of this machine: %w; put it there again, or take the lab down with `fathom down --name %s`", n.Name, err, l.Name)
		}
	}
	return nil
}

func (l *Lab) up(ctx context.Context, m *manifests, fresh bool, t *timeline) error {
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if l.built(c) {
			continue
		}
		if err := l.wipe(ctx, c); err != nil {
			return fmt.Errorf("clear what is left of cluster %s: %w", c.Name, err)
		}
	}
	var store image.Store
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return t.detailed("", "prepare images", func(say func(string)) error {
			var err error
			store, err = image.Prepare(gctx, l.Kit, l.Paths.Cache, say)
			return err
		})
	})
	g.Go(func() error {
		return t.detailed("", "lay the wires", func(say func(string)) error {
			// doctor refuses what does not run without it.
			if err := link.LoadBridgeFilter(); err != nil {
				say("Services do not work between pods of one node: " + err.Error())
			}
			return l.setWires()
		})
	})
	if err := g.Wait(); err != nil {
		return err
	}
	defer store.Close()

	var from *restored
	if _, err := os.Stat(l.dir(origin)); err == nil {
		err := t.step("", "lay out the nodes' disks", func() error {
			var err error
			from, err = l.openOrigin(ctx, store)
			return err
		})
		if err != nil {
			return err
		}
	}
	g, gctx = errgroup.WithContext(ctx)
	for i := range l.Clusters {
		c := &l.Clusters[i]
		g.Go(func() error {
			if err := l.start(gctx, l.assemble(c, m, t), store, from, fresh); err != nil {
				return fmt.Errorf("cluster %s: %w", c.Name, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil || from == nil {
		return err
	}
	return l.closeOrigin()
}

// start brings a cluster up in the shortest way that it has.
func (l *Lab) start(ctx context.Context, a *assembly, store image.Store, from *restored, fresh bool) error {
	if l.built(a.c) {
		return a.resume(ctx)
	}
	if from != nil {
		return a.restore(ctx, from)
	}
	if !fresh {
		if t := l.readTemplate(a.c); t != nil {
			return a.buildFrom(ctx, store, t)
		}
	}
	return a.build(ctx, store, !fresh)
}

// wipe ends the nodes of a cluster and removes their disks.
func (l *Lab) wipe(ctx context.Context, c *topology.Cluster) error {
	for _, n := range c.Nodes {
		if err := machine.Kill(ctx, l.cgroup(n.Name)); err != nil {
			return err
		}
		if err := cgroup.Remove(l.cgroup(n.Name)); err != nil {
			return err
		}
		if err := os.RemoveAll(l.dir("nodes", n.Name)); err != nil {
			return err
		}
	}
	return nil
}
