package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/lab/kubeconfig"
)

func (a *app) kubectl() *cobra.Command {
	return &cobra.Command{
		Use:   "kubectl [--name LAB] [--cluster CLUSTER] [--] ARGS…",
		Short: "Run the kit's kubectl against a cluster (the first one without --cluster)",
		Example: `  fathom kubectl -- get pods -A
  fathom kubectl --cluster west -- apply -f app.yaml`,
		// kubectl's own flags are not fathom's: only those before its arguments are read here.
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			rest, help, err := a.ownFlags(args)
			if err != nil {
				return err
			}
			if help {
				return cmd.Help()
			}
			l, err := a.open()
			if err != nil {
				return err
			}
			c, err := l.Cluster(a.cluster)
			if err != nil {
				return err
			}
			k, err := kit.Find()
			if err != nil {
				return err
			}
			conf := l.AdminKubeconfig(c)
			if _, err := os.Stat(conf); err != nil {
				if errors.Is(err, os.ErrPermission) {
					return fmt.Errorf("read the credentials of cluster %s: %w: run it with sudo", c.Name, err)
				}
				return fmt.Errorf("cluster %s has no credentials yet: %w; bring it up with `fathom up%s`", c.Name, err, nameFlag(l.Name))
			}
			if err := os.Setenv("KUBECACHEDIR", l.KubectlCache()); err != nil {
				return err
			}
			if err := os.Setenv("KUBECONFIG", conf); err != nil {
				return err
			}
			// A URL that kubectl applies may need the proxy; the lab never does.
			if err := os.Setenv("NO_PROXY", strings.Trim(noProxy()+","+l.APIAddr(c).String(), ",")); err != nil {
				return err
			}
			// kubectl replaces this process, and so gets the terminal and the signals.
			path := k.Bin("kubectl")
			if err := syscall.Exec(path, append([]string{"kubectl"}, rest...), os.Environ()); err != nil {
				return fmt.Errorf("run %s: %w", path, err)
			}
			return nil
		},
	}
}

// ownFlags removes fathom's own flags from the start of the arguments, up to the first other argument or "--".
func (a *app) ownFlags(args []string) (rest []string, help bool, err error) {
	targets := map[string]*string{"--name": &a.name, "--cluster": &a.cluster}
	for len(args) > 0 {
		name, value, hasValue := strings.Cut(args[0], "=")
		target := targets[name]
		switch {
		case args[0] == "--":
			return args[1:], false, nil
		case args[0] == "--help" || args[0] == "-h":
			return nil, true, nil
		case target == nil:
			return args, false, nil
		case hasValue:
			*target, args = value, args[1:]
		case len(args) == 1:
			return nil, false, fmt.Errorf("flag needs an argument: %s", name)
		default:
			*target, args = args[1], args[2:]
		}
	}
	return nil, false, nil
}

// noProxy returns what the environment exempts from its proxy, as Go programs read it.
func noProxy() string {
	if v := os.Getenv("NO_PROXY"); v != "" {
		return v
	}
	return os.Getenv("no_proxy")
}

func (a *app) kubeconfig() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "kubeconfig",
		Short: "Print the kubeconfig of a lab, or of one of its clusters",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			conf, err := l.Kubeconfig(a.cluster)
			if err != nil {
				return err
			}
			data, err := clientcmd.Write(*conf)
			if err != nil {
				return err
			}
			if path == "" {
				_, err = a.out.Write(data)
				return err
			}
			if err := kubeconfig.WriteSecret(path, data); err != nil {
				return fmt.Errorf("write the kubeconfig: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&path, "to", "", "write it to a `file` that only its owner can read, instead of standard output")
	return cmd
}
