package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/internal/kit"
)

// The bare start is what no lab can do without: etcd and kube-apiserver, started side by side with the flags
// that kubeadm writes for them, until /readyz says ok. There is no kubelet, no container and no other
// program, and certificates are made beforehand.

// bareConfig has the same choices as a lab's: ECDSA keys, and an etcd that does not wait for the disk. The
// address is one of those that are kept for documentation; it exists in the namespace of the run only.
const bareConfig = `apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: ` + bareAddr + `, bindPort: 6443}
nodeRegistration: {name: bare, criSocket: unix:///run/containerd/containerd.sock}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: %s
encryptionAlgorithm: ECDSA-P256
etcd: {local: {dataDir: /var/lib/etcd, extraArgs: [{name: unsafe-no-fsync, value: "true"}]}}
`

const bareAddr = "192.0.2.1"

// bareArg makes this program the first process of the namespaces of a bare start.
const bareArg = "bare-start"

type bareResult struct {
	Seconds    float64
	CPUSeconds float64
}

// bareStart measures one bare start in namespaces of its own, of which nothing stays. The programs get env
// beside the environment.
func bareStart(ctx context.Context, k kit.Kit, env ...string) (bareResult, error) {
	dir, err := os.MkdirTemp("/var/tmp", "fathom-bench-")
	if err != nil {
		return bareResult{}, err
	}
	defer os.RemoveAll(dir)
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe", bareArg, k.Dir, dir)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		return bareResult{}, fmt.Errorf("bare start: %w\n%s", err, stderr.String())
	}
	var r bareResult
	return r, json.Unmarshal(stdout.Bytes(), &r)
}

// bareMain is the run inside of the namespaces. Its end is the end of every process in them.
func bareMain(kitDir, dir string) error {
	k, err := kit.Open(kitDir)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "kubeadm.yaml"), fmt.Appendf(nil, bareConfig, k.Kubernetes), 0o600); err != nil {
		return err
	}
	run := func(name string, args ...string) error {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, out)
		}
		return nil
	}
	if err := run("ip", "link", "set", "lo", "up"); err != nil {
		return err
	}
	if err := run("ip", "address", "add", bareAddr+"/32", "dev", "lo"); err != nil {
		return err
	}
	for _, phase := range []string{"certs all", "etcd local", "control-plane apiserver"} {
		args := append([]string{"init", "phase"}, strings.Fields(phase)...)
		if err := run(k.Bin("kubeadm"), append(args, "--rootfs="+dir, "--config=/kubeadm.yaml")...); err != nil {
			return err
		}
	}
	var programs []*exec.Cmd
	for _, name := range []string{"etcd", "kube-apiserver"} {
		command, err := manifestCommand(filepath.Join(dir, "etc/kubernetes/manifests", name+".yaml"))
		if err != nil {
			return err
		}
		log, err := os.Create(filepath.Join(dir, name+".log"))
		if err != nil {
			return err
		}
		cmd := exec.Command(k.Bin(command[0]), inRoot(dir, command[1:])...)
		cmd.Stdout, cmd.Stderr = log, log
		programs = append(programs, cmd)
	}

	start := time.Now()
	for _, cmd := range programs {
		if err := cmd.Start(); err != nil {
			return err
		}
	}
	if err := waitReadyz("https://"+bareAddr+":6443/readyz", 2*time.Minute); err != nil {
		for _, name := range []string{"etcd", "kube-apiserver"} {
			log, _ := os.ReadFile(filepath.Join(dir, name+".log"))
			err = fmt.Errorf("%w\n%s: %s", err, name, log[max(0, len(log)-2000):])
		}
		return err
	}
	r := bareResult{Seconds: time.Since(start).Seconds()}
	for _, cmd := range programs {
		_ = cmd.Process.Kill()
	}
	for _, cmd := range programs {
		_ = cmd.Wait() // says that it was killed
		r.CPUSeconds += (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// manifestCommand is the command of the one container of a static pod.
func manifestCommand(path string) ([]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var pod corev1.Pod
	if err := yaml.Unmarshal(data, &pod); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(pod.Spec.Containers) != 1 || len(pod.Spec.Containers[0].Command) == 0 {
		return nil, fmt.Errorf("%s: not one container with a command", path)
	}
	return pod.Spec.Containers[0].Command, nil
}

// inRoot moves the paths among a program's arguments below dir.
func inRoot(dir string, args []string) []string {
	var moved []string
	for _, arg := range args {
		for _, path := range []string{"/etc/kubernetes/", "/var/lib/etcd"} {
			arg = strings.Replace(arg, "="+path, "="+dir+path, 1)
		}
		moved = append(moved, arg)
	}
	return moved
}

func waitReadyz(url string, limit time.Duration) error {
	client := &http.Client{
		Timeout: time.Second,
		// The address is this namespace's own, and nobody else is in it.
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
	}
	last := ""
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		resp, err := client.Get(url)
		if err != nil {
			last = err.Error()
			continue
		}
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return nil
		}
		last = resp.Status + " " + string(body)
	}
	return fmt.Errorf("%s is not ok within %v: %s", url, limit, last)
}
