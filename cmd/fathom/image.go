package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/facts/standin"
	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/lab"
	"github.com/fathom-network/fathom/internal/lab/image"
)

func (a *app) image() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "List images and load them into nodes"}
	cmd.AddCommand(a.imageLs(), a.imageLoad(), a.imageBuild(), a.imageNetwork())
	return cmd
}

// targets are the running nodes that the flags select.
func (a *app) targets(l *lab.Lab) ([]image.Target, error) {
	nodes, err := l.Nodes(a.cluster)
	if err != nil {
		return nil, err
	}
	var targets []image.Target
	for _, n := range nodes {
		if n.State != "running" {
			continue
		}
		m, err := l.Machine(n.Name)
		if err != nil {
			return nil, err
		}
		targets = append(targets, image.Target{Name: n.Name, SocketPath: m.File(lab.ContainerdSocket)})
	}
	if len(targets) == 0 {
		return nil, fmt.Errorf("no node of lab %s is running: bring it up with `fathom up%s`", l.Name, nameFlag(l.Name))
	}
	return targets, nil
}

func (a *app) imageLoad() *cobra.Command {
	return &cobra.Command{
		Use:   "load FILE…",
		Short: "Load images from tar files, or from - (standard input), into the nodes of a lab, or of --cluster",
		Long: `Loads images into every running node. A file is what "docker save", "podman save" or "skopeo copy" write: a
docker-archive or an OCI layout in a tar file, plain or compressed with gzip, zstd, xz or bzip2.`,
		Example: `  fathom image load app.tar base.tar.zst
  docker save app:dev | fathom image load -`,
		Args: cobra.MinimumNArgs(1), PreRunE: requireRoot,
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			targets, err := a.targets(l)
			if err != nil {
				return err
			}
			k, err := kit.Find()
			if err != nil {
				return err
			}
			start := time.Now()
			names, skipped, err := image.Load(cmd.Context(), k, args, image.Input{Stdin: a.in, Dir: l.StateDir()}, targets)
			if err != nil {
				return err
			}
			for _, s := range skipped {
				fmt.Fprintln(a.out, "Skipped of", s)
			}
			fmt.Fprintf(a.out, "Loaded %s into %s in %.1f s.\n", strings.Join(names, ", "), count(len(targets), "node"), time.Since(start).Seconds())
			return nil
		},
	}
}

func (a *app) imageLs() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use: "ls", Short: "List the images of a lab's nodes, and how many nodes have each", Args: cobra.NoArgs, PreRunE: requireRoot,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			targets, err := a.targets(l)
			if err != nil {
				return err
			}
			type line struct {
				Name  string   `json:"name"`
				ID    string   `json:"id"`
				Size  uint64   `json:"size"`
				Nodes []string `json:"nodes"`
				// StandIn says that the image is the lab's stand-in for the one whose name it has.
				StandIn bool `json:"standIn"`
			}
			index := map[string]int{}
			lines := []line{}
			for _, t := range targets {
				images, err := image.List(cmd.Context(), t)
				if err != nil {
					return err
				}
				for _, img := range images {
					for _, name := range img.Names {
						i, seen := index[name+img.ID]
						if !seen {
							i = len(lines)
							index[name+img.ID] = i
							lines = append(lines, line{Name: name, ID: img.ID, Size: img.Size, StandIn: standin.Of(img.Names) && !standin.IsLocal(standin.Repository(name))})
						}
						lines[i].Nodes = append(lines[i].Nodes, t.Name)
					}
				}
			}
			var rows [][]string
			for _, l := range lines {
				is := ""
				if l.StandIn {
					is = "yes"
				}
				rows = append(rows, []string{l.Name, short(strings.TrimPrefix(l.ID, "sha256:")), fmt.Sprintf("%.1fMB", float64(l.Size)/1e6), is, fmt.Sprintf("%d/%d", len(l.Nodes), len(targets))})
			}
			return o.print(a, lines, "IMAGE ID SIZE STAND-IN NODES", rows)
		},
	}
	o.register(cmd)
	return cmd
}

// imageBuild is part of `make build`.
func (a *app) imageBuild() *cobra.Command {
	return &cobra.Command{
		Use:   "build",
		Short: "Build the local images from the kit's and this machine's programs (part of `make build`)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := kit.Find()
			if err != nil {
				return err
			}
			return image.Build(cmd.Context(), k, func(s string) { fmt.Fprintln(a.err, s) })
		},
	}
}

// imageNetwork is part of `make dist`.
func (a *app) imageNetwork() *cobra.Command {
	var programs []string
	cmd := &cobra.Command{
		Use:    "network DIRECTORY",
		Short:  "Write the network's images as an OCI image layout, and their digests into the kit",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			of, err := parsePairs("--programs", programs)
			if err != nil {
				return err
			}
			k, err := kit.Find()
			if err != nil {
				return err
			}
			n, err := image.WriteNetwork(args[0], version, of)
			if err != nil {
				return err
			}
			return n.Record(k)
		},
	}
	cmd.Flags().StringArrayVar(&programs, "programs", nil, "a directory of programs for an architecture, `ARCH=DIRECTORY`; may be repeated")
	return cmd
}
