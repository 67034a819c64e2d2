package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/lab"
	"github.com/fathom-network/fathom/internal/watch/cri"
)

func (a *app) node() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Inspect, enter, stop and start nodes"}
	cmd.AddCommand(a.nodeLs(), a.nodeExec(), a.nodeShell(), a.nodePs(), a.nodeLogs(),
		a.nodeAction("start NODE…", "Boot nodes that are off", func(cmd *cobra.Command, node string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			return l.StartNode(cmd.Context(), node)
		}),
		a.nodeAction("stop NODE…", "Shut nodes down cleanly", func(cmd *cobra.Command, node string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			return l.StopNode(cmd.Context(), node)
		}),
		a.nodeAction("kill NODE…", "Cut the power of nodes", func(cmd *cobra.Command, node string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			return l.KillNode(cmd.Context(), node)
		}))
	return cmd
}

// nodeAction returns a command that does the same to each given node.
func (a *app) nodeAction(use, short string, do func(*cobra.Command, string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.MinimumNArgs(1), PreRunE: requireRoot, ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, node := range args {
				start := time.Now()
				if err := do(cmd, node); err != nil {
					return err
				}
				verb, _, _ := strings.Cut(use, " ")
				fmt.Fprintf(a.err, "%5.1fs %s %s\n", time.Since(start).Seconds(), verb, node)
			}
			return nil
		},
	}
}

func (a *app) nodeLs() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use: "ls", Short: "List the nodes of a lab", Args: cobra.NoArgs, PreRunE: requireRoot,
		RunE: func(*cobra.Command, []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			nodes, err := l.Nodes(a.cluster)
			if err != nil {
				return err
			}
			var rows [][]string
			for _, n := range nodes {
				pid := ""
				if n.Pid != 0 {
					pid = strconv.Itoa(n.Pid)
				}
				rows = append(rows, []string{n.Name, n.Cluster, n.Role, n.State, strings.Join(n.Addresses, ","), strings.Join(n.PodCIDRs, ","), pid})
			}
			return o.print(a, nodes, "NAME CLUSTER ROLE STATE ADDRESS POD-CIDR INIT-PID", rows)
		},
	}
	o.register(cmd)
	return cmd
}

func (a *app) nodeExec() *cobra.Command {
	return &cobra.Command{
		Use:               "exec NODE -- CMD…",
		Short:             "Run a command on a node; its exit status is the command's",
		Example:           "  fathom node exec east-worker1 -- ip route",
		Args:              cobra.MinimumNArgs(2),
		PreRunE:           requireRoot,
		ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runOn(cmd, args[0], args[1:])
		},
	}
}

func (a *app) nodeShell() *cobra.Command {
	return &cobra.Command{
		Use:               "shell NODE",
		Short:             "Open a shell on a node",
		Args:              cobra.ExactArgs(1),
		PreRunE:           requireRoot,
		ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			shell := "/bin/sh"
			if _, err := os.Stat("/bin/bash"); err == nil {
				shell = "/bin/bash" // the node's root file system is the host's
			}
			return a.runOn(cmd, args[0], []string{shell, "-l"})
		},
	}
}

func (a *app) runOn(cmd *cobra.Command, node string, args []string) error {
	l, err := a.open()
	if err != nil {
		return err
	}
	if _, _, err := l.Node(node); err != nil {
		return err
	}
	m, err := l.Machine(node)
	if err != nil {
		return err
	}
	c := machine.Command(args...)
	// The terminal sends Ctrl-C to the command as well, which may handle it: fathom waits for it to end.
	ctx := context.WithoutCancel(cmd.Context())
	if term.IsTerminal(int(a.in.Fd())) && term.IsTerminal(int(a.out.Fd())) {
		err = a.runInTerminal(ctx, m, c)
	} else {
		c.Stdin, c.Stdout, c.Stderr = a.in, a.out, a.err
		err = m.Run(ctx, c)
	}
	var exited *exec.ExitError
	if errors.As(err, &exited) {
		if status, ok := exited.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return programExit(128 + int(status.Signal())) // as a shell does
		}
		return programExit(exited.ExitCode())
	}
	return err
}

// programExit is the exit status of a program on a node, which becomes fathom's own. The program has reported
// the reason itself.
type programExit int

func (e programExit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func (a *app) nodePs() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use: "ps NODE", Short: "List the pods and containers of a node, as its container runtime sees them",
		Args: cobra.ExactArgs(1), PreRunE: requireRoot, ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			if _, _, err := l.Node(args[0]); err != nil {
				return err
			}
			m, err := l.Machine(args[0])
			if err != nil {
				return err
			}
			c, err := cri.Connect(m.File(lab.ContainerdSocket))
			if err != nil {
				return err
			}
			defer c.Close()
			pods, err := c.Pods(cmd.Context())
			if err != nil {
				return err
			}
			var rows [][]string
			for _, p := range pods {
				for _, ctr := range p.Containers {
					rows = append(rows, []string{p.Namespace, p.Name, ctr.Name, strings.ToLower(string(ctr.State)), strconv.Itoa(int(ctr.Attempt)),
						age(ctr.Created), joinAddrs(p.IPs), short(ctr.ID), strconv.Itoa(ctr.PID), ctr.Image})
				}
				if len(p.Containers) == 0 {
					rows = append(rows, []string{p.Namespace, p.Name, "", podState(p), "", age(p.Created), joinAddrs(p.IPs), "", "", ""})
				}
			}
			return o.print(a, pods, "NAMESPACE POD CONTAINER STATE RESTARTS AGE IP ID PID IMAGE", rows)
		},
	}
	o.register(cmd)
	return cmd
}

func joinAddrs(addrs []netip.Addr) string {
	var s []string
	for _, a := range addrs {
		s = append(s, a.String())
	}
	return strings.Join(s, ",")
}

func podState(p cri.Pod) string {
	if p.Ready {
		return "no container"
	}
	return "ended"
}

func short(id string) string { return id[:min(13, len(id))] }

func age(t time.Time) string {
	d := time.Since(t)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func (a *app) nodeLogs() *cobra.Command {
	var follow bool
	var tail int
	cmd := &cobra.Command{
		Use:   "logs NODE [PROGRAM]",
		Short: "Print the log of a node's program: containerd, kubelet, init, or a container such as kube-apiserver",
		Example: `  fathom node logs east-worker1 kubelet
  fathom node logs -f east-control-plane kube-apiserver`,
		Args: cobra.RangeArgs(1, 2), PreRunE: requireRoot,
		ValidArgsFunction: func(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return []string{"containerd", "kubelet", "mirror", "init"}, cobra.ShellCompDirectiveNoFileComp
			}
			return a.completeNodes(cmd, args, s)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			program := "kubelet"
			if len(args) == 2 {
				program = args[1]
			}
			path, err := l.LogFile(args[0], program)
			if err != nil {
				return err
			}
			return tailFile(cmd.Context(), a.out, path, tail, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "keep printing as the log grows")
	cmd.Flags().IntVar(&tail, "tail", -1, "only the last `lines`")
	return cmd
}

// lastLines positions f at the start of its last n lines.
func lastLines(f *os.File, n int) error {
	if n < 0 {
		return nil
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	const block = 64 << 10
	buf := make([]byte, block)
	for end, newlines := size, 0; end > 0; {
		begin := max(0, end-block)
		part := buf[:end-begin]
		if _, err := f.ReadAt(part, begin); err != nil {
			return err
		}
		for i := len(part) - 1; i >= 0; i-- {
			at := begin + int64(i)
			if part[i] == '\n' && at != size-1 {
				if newlines++; newlines == n {
					_, err := f.Seek(at+1, io.SeekStart)
					return err
				}
			}
		}
		end = begin
	}
	if n == 0 {
		return nil
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}
