package main

import (
	"encoding/json"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/lab/doctor"
)

func (a *app) doctor() *cobra.Command {
	var o output
	var verbose bool
	var file string
	cmd := &cobra.Command{
		Use:   "doctor [-f LAB.YAML]",
		Short: "Show what this machine has and lacks for a lab, with remedies",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			want, err := a.describe(cmd.Context(), file, topology.Overrides{})
			if err != nil {
				return err
			}
			options := doctor.For(want)
			options.StateDir = a.paths.State
			checks := doctor.Run(cmd.Context(), options)
			switch o.format {
			case "":
				err = doctor.Write(a.out, checks, verbose)
			case "yaml":
				var data []byte
				if data, err = yaml.Marshal(checks); err == nil {
					_, err = a.out.Write(data)
				}
			default:
				enc := json.NewEncoder(a.out)
				enc.SetIndent("", "  ")
				err = enc.Encode(checks)
			}
			if err != nil {
				return err
			}
			return doctor.Failed(checks)
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "check for the lab of this `file` instead of the default one")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "show what is fine, too")
	o.register(cmd)
	return cmd
}
