package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/internal/lab"
)

// output is the -o flag of commands that print a table.
type output struct{ format string }

func (o *output) register(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.format, "output", "o", "", "json or yaml instead of a table")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
}

// print writes v as the flag asks, or else the table.
func (o *output) print(a *app, v any, header string, rows [][]string) error {
	switch o.format {
	case "json":
		enc := json.NewEncoder(a.out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	case "yaml":
		data, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = a.out.Write(data)
		return err
	case "":
	default:
		return fmt.Errorf("-o %s: want json or yaml", o.format)
	}
	w := tabwriter.NewWriter(a.out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, strings.ReplaceAll(header, " ", "\t"))
	for _, row := range rows {
		for i, cell := range row {
			if cell == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	return w.Flush()
}

type labLine struct {
	Name     string   `json:"name"`
	State    string   `json:"state"`
	Clusters []string `json:"clusters"`
	Nodes    int      `json:"nodes"`
	Running  int      `json:"running"`
}

func (a *app) ls() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List the labs of this machine",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			names, err := lab.Names(a.paths)
			if err != nil {
				return err
			}
			lines := []labLine{}
			var rows [][]string
			for _, name := range names {
				line := labLine{Name: name, State: "unfinished"}
				l, err := a.openNamed(name)
				if errors.Is(err, os.ErrPermission) {
					return err
				}
				if err == nil {
					nodes, err := l.Nodes("")
					if err != nil {
						return err
					}
					line.Nodes = len(nodes)
					for _, n := range nodes {
						if n.State == "running" {
							line.Running++
						}
					}
					for _, c := range l.Clusters {
						line.Clusters = append(line.Clusters, c.Name)
					}
					line.State = l.State(line.Running)
				}
				lines = append(lines, line)
				rows = append(rows, []string{line.Name, line.State, strings.Join(line.Clusters, ","), fmt.Sprintf("%d/%d", line.Running, line.Nodes)})
			}
			if len(lines) == 0 && o.format == "" {
				fmt.Fprintln(a.err, "There is no lab. Start one with `fathom up`.")
				return nil
			}
			return o.print(a, lines, "NAME STATE CLUSTERS NODES", rows)
		},
	}
	o.register(cmd)
	return cmd
}
