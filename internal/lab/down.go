package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/lab/kubeconfig"
)

// Down ends a lab and leaves nothing of it. It needs nothing but the lab's name, so that it works on
// whatever an interrupted Up left. It fails if there is no trace of such a lab.
func Down(ctx context.Context, paths Paths, name string, report Report) error {
	t := &timeline{report: report}
	l := &Lab{Lab: topology.Lab{Name: name}, Paths: paths}
	if !topology.IsName(name) || !l.traces() {
		_, err := Open(paths, name)
		return err
	}
	unlock, err := lock(paths, name)
	if err != nil {
		return err
	}
	defer unlock()
	return l.down(ctx, t)
}

// down ends a lab that no other command changes meanwhile.
func (l *Lab) down(ctx context.Context, t *timeline) error {
	noted := l.notedKubeconfigs()
	err := t.step("", "end every process", func() error { return cgroup.Kill(ctx, l.cgroup()) })
	if err != nil {
		return err
	}
	// First, while the lab's directory says which files those are. Should it fail, the rest goes nevertheless.
	errConfig := t.step("", "take it out of the kubeconfig", func() error { return l.cleanKubeconfig(noted) })
	var g errgroup.Group
	g.Go(func() error {
		return t.step("", "remove the nodes' disks", func() error {
			if err := os.RemoveAll(l.dir()); err != nil {
				return fmt.Errorf("remove the disks of lab %s: %w", l.Name, err)
			}
			return nil
		})
	})
	g.Go(func() error {
		return t.step("", "remove the wires", func() error { return l.removeWires() })
	})
	g.Go(func() error {
		return t.step("", "remove the cgroups", func() error {
			if err := cgroup.Remove(l.cgroup()); err != nil {
				return err
			}
			return cgroup.Prune(cgroupRoot)
		})
	})
	if err := g.Wait(); err != nil {
		return errors.Join(err, errConfig)
	}
	if errConfig != nil {
		// The lab is there until its contexts are gone, so that another down can take them.
		return errors.Join(errConfig, l.noteKubeconfigs(append(noted, kubeconfig.Files()...)))
	}
	unlockState, err := lockDir(l.Paths.State)
	if err != nil {
		return err
	}
	defer unlockState()
	if names, err := Names(l.Paths); err != nil || len(names) > 0 {
		return err
	}
	// Nobody uses the layers now. One of an older kit would keep that kit's files on the disk.
	if err := os.RemoveAll(filepath.Join(l.Paths.Cache, "layers")); err != nil {
		return fmt.Errorf("remove the nodes' shared layers: %w", err)
	}
	return nil
}

// traces says whether anything of the lab is there.
func (l *Lab) traces() bool {
	if _, err := os.Stat(l.dir()); err == nil {
		return true
	}
	if _, err := os.Stat(filepath.Dir(l.netnsPath(coreName))); err == nil {
		return true
	}
	groups, err := cgroup.List(cgroupRoot)
	if err != nil {
		return false
	}
	for _, g := range groups {
		if g == l.Name {
			return true
		}
	}
	return false
}

// removeEmpty removes directories that hold nothing.
func removeEmpty(dirs ...string) {
	for _, dir := range dirs {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return
		}
	}
}

// Purge removes what is made once for all labs. It fails while there is a lab.
func Purge(paths Paths) error {
	names, err := Names(paths)
	if err != nil {
		return err
	}
	if len(names) > 0 {
		return fmt.Errorf("remove the prepared images: lab %s uses them", names[0])
	}
	if err := os.RemoveAll(paths.Cache); err != nil {
		return fmt.Errorf("remove the prepared images: %w", err)
	}
	return nil
}
