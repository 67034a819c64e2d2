// Package saved has a lab in a file: what its clusters have stored, what is on its nodes' disks, and the images that were loaded. A lab
// that begins with such a file has the same objects, and goes on from there.
//
// The package reads and writes files and directories that it is given. It asks no cluster, and starts nothing.
package saved

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/lab/stored"
)

// format is raised when files begin to look different. A file of another format is not read.
const format = 1

// Header says what a file has. It is the first of its contents.
type Header struct {
	Format int
	// Lab is the lab's definition, with the underlay that it had.
	Lab   topology.Lab
	Taken time.Time
	// Kubernetes and Fathom are the versions of the programs.
	Kubernetes, Fathom string
	// Secrets says that Secrets are in the file as they were, and the keys of the clusters. Without them, they are made anew.
	Secrets bool
	// Periodic is one of a row that is taken now and then, and is removed by itself.
	Periodic bool `json:",omitempty"`
	// Cut are the nodes whose wires were cut.
	Cut []string `json:",omitempty"`
}

// Cluster is what a cluster has stored.
type Cluster struct {
	State stored.State
	// Planes are the disks of the control-plane nodes, by the nodes' names.
	Planes map[string]stored.Disk
	// Public are the certificates of the cluster's authorities, by name.
	Public map[string]string
	// Keys are the files of the authorities and of other keys that the control-plane nodes share; none without secrets.
	Keys map[string][]byte `json:",omitempty"`
}

// Image is an image that was loaded into nodes.
type Image struct {
	Names []string // one at least
	Nodes []string
}

// NotSavedError says why a lab cannot be saved, or not without its secrets.
type NotSavedError struct {
	// Objects are the keys of the objects that are at fault.
	Objects []string
	Why     string
}

func (e *NotSavedError) Error() string {
	some := e.Objects[:min(len(e.Objects), 5)]
	text := strings.Join(some, ", ")
	if n := len(e.Objects) - len(some); n > 0 {
		text += fmt.Sprintf(" and %d more", n)
	}
	return text + ": " + e.Why
}

// IsNotSaved says whether a lab is one that cannot be saved as it is.
func IsNotSaved(err error) bool {
	var e *NotSavedError
	return errors.As(err, &e)
}

// InvalidError says that a file is no saved lab, or not a whole one.
type InvalidError struct{ Err error }

func (e *InvalidError) Error() string {
	return "it is no saved lab, or not a whole one: " + e.Err.Error()
}
func (e *InvalidError) Unwrap() error { return e.Err }

// IsInvalid says whether a file is no saved lab, or not a whole one.
func IsInvalid(err error) bool {
	var e *InvalidError
	return errors.As(err, &e)
}

// check says what is wrong with a header. A file may be anybody's: its names become parts of paths, and what it is to be given of the host
// is the host's to say.
func (h *Header) check() error {
	if h.Format != format {
		return fmt.Errorf("it has the format %d, and this program reads %d", h.Format, format)
	}
	data, err := topology.Record(&h.Lab)
	if err != nil {
		return err
	}
	if _, err := topology.Decode(data, h.Lab.Name); err != nil {
		return err
	}
	for _, name := range h.Cut {
		if !hasNode(&h.Lab, name) {
			return fmt.Errorf("it has no node %q, whose wire is cut", name)
		}
	}
	return nil
}

func hasNode(l *topology.Lab, name string) bool {
	for i := range l.Clusters {
		for _, n := range l.Clusters[i].Nodes {
			if n.Name == name {
				return true
			}
		}
	}
	return false
}

// HostPaths are the paths of the host that the lab's nodes see.
func (h *Header) HostPaths() (paths []string) {
	for _, c := range h.Lab.Clusters {
		for _, v := range c.APIServerVolumes {
			paths = append(paths, v.HostPath)
		}
		for _, n := range c.Nodes {
			for _, m := range n.Mounts {
				paths = append(paths, m.HostPath)
			}
		}
	}
	return paths
}
