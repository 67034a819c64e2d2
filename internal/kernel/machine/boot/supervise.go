package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/machine"
)

const (
	restartDelay = time.Second      // between the end of a service and its next start, as systemd's RestartSec
	stopGrace    = 10 * time.Second // between SIGTERM and SIGKILL
	notifySocket = "/run/fathom-notify.sock"
)

// supervisor is a machine's init after set-up. All its state belongs to the one goroutine of run; the
// others only send it events.
type supervisor struct {
	services []*service
	events   chan func()
}

// service is the running state of a machine.Service.
type service struct {
	machine.Service
	pid      int
	ready    bool
	wanted   bool
	restarts int
	lastExit string
	started  bool // the next start is a restart
	waiters  []chan<- machine.Response
}

// Supervise starts the services and keeps them, reaps every orphan of the machine and answers on the
// control socket. It returns only after a power-off request or SIGTERM, when every process has ended.
// ready is called once the control socket can be used.
func Supervise(spec machine.Spec, ready func() error) error {
	s := &supervisor{events: make(chan func())}
	for _, svc := range spec.Services {
		s.services = append(s.services, &service{Service: svc, wanted: !svc.Manual})
	}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notifySocket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("listen for service readiness: %w", err)
	}
	if err := passCredentials(notify); err != nil {
		return fmt.Errorf("listen for service readiness: %w", err)
	}
	control, err := net.Listen("unix", machine.ControlSocket)
	if err != nil {
		return fmt.Errorf("listen for control requests: %w", err)
	}
	if err := os.Chmod(machine.ControlSocket, 0o600); err != nil {
		return err
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGCHLD, unix.SIGTERM, unix.SIGINT)
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	go s.listenNotify(notify)
	go s.listenControl(control)
	if err := ready(); err != nil {
		return err
	}
	return s.run(signals)
}

func (s *supervisor) run(signals <-chan os.Signal) error {
	s.startWanted()
	for {
		select {
		case f := <-s.events:
			if f == nil {
				return s.powerOff()
			}
			f()
		case sig := <-signals:
			if sig != unix.SIGCHLD {
				return s.powerOff()
			}
			s.reap()
		}
	}
}

func (s *supervisor) find(name string) *service {
	for _, svc := range s.services {
		if svc.Name == name {
			return svc
		}
	}
	return nil
}

func (s *supervisor) startWanted() {
	for _, svc := range s.services {
		after := s.find(svc.After)
		if svc.wanted && svc.pid == 0 && (after == nil || after.ready) {
			s.start(svc)
		}
	}
}

func (s *supervisor) start(svc *service) {
	pid, err := spawn(svc.Service)
	if err != nil {
		svc.lastExit = err.Error()
		fmt.Fprintf(os.Stderr, "start %s: %v\n", svc.Name, err)
		s.later(restartDelay)
		return
	}
	if svc.started {
		svc.restarts++
	}
	svc.started, svc.pid, svc.ready = true, pid, false
}

// later lets the wanted services be started after d.
func (s *supervisor) later(d time.Duration) {
	time.AfterFunc(d, func() { s.events <- s.startWanted })
}

func spawn(svc machine.Service) (int, error) {
	if err := os.MkdirAll(filepath.Dir(svc.Log), 0o755); err != nil {
		return 0, err
	}
	log, err := os.OpenFile(svc.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	env := append(append([]string{}, baseEnv...), "NOTIFY_SOCKET="+notifySocket)
	p, err := os.StartProcess(svc.Args[0], svc.Args, &os.ProcAttr{
		Dir: "/", Env: append(env, svc.Env...), Files: []*os.File{null, log, log},
		Sys: &unix.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, err
	}
	pid := p.Pid
	return pid, p.Release() // reap waits for it, with all the others
}

var baseEnv = []string{"PATH=" + machine.Path, "HOME=/root", "LANG=C.UTF-8"}

// reap collects every child that ended: services, and whatever lost its parent in this machine.
func (s *supervisor) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		for _, svc := range s.services {
			if svc.pid == pid {
				s.ended(svc, status)
			}
		}
	}
}

func (s *supervisor) ended(svc *service, status unix.WaitStatus) {
	svc.pid, svc.ready = 0, false
	svc.lastExit = fmt.Sprintf("exit status %d", status.ExitStatus())
	if status.Signaled() {
		svc.lastExit = "signal " + status.Signal().String()
	}
	fmt.Fprintf(os.Stderr, "%s %s ended: %s\n", time.Now().Format(time.RFC3339), svc.Name, svc.lastExit)
	if svc.wanted {
		s.later(restartDelay)
	}
}

// listenNotify takes the messages of sd_notify(3). The kernel says which process sent one.
func (s *supervisor) listenNotify(c *net.UnixConn) {
	buf, oob := make([]byte, 4096), make([]byte, 256)
	for {
		n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		pid := senderPid(oob[:oobn])
		for line := range strings.Lines(string(buf[:n])) {
			if strings.TrimSpace(line) == "READY=1" {
				s.events <- func() { s.becameReady(pid) }
			}
		}
	}
}

func passCredentials(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) {
		inner = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	}); err != nil {
		return err
	}
	return inner
}

func senderPid(oob []byte) int {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0
	}
	for _, m := range messages {
		if cred, err := unix.ParseUnixCredentials(&m); err == nil {
			return int(cred.Pid)
		}
	}
	return 0
}

func (s *supervisor) becameReady(pid int) {
	for _, svc := range s.services {
		if svc.pid == pid && pid != 0 {
			svc.ready = true
			svc.tellWaiters()
		}
	}
	s.startWanted()
}

func (s *supervisor) listenControl(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go s.serve(c)
	}
}

// requestPatience is how long a request may take to arrive. Those who ask write it at once.
const requestPatience = 10 * time.Second

func (s *supervisor) serve(c net.Conn) {
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(requestPatience))
	req, err := machine.DecodeRequest(c)
	if err != nil {
		_ = json.NewEncoder(c).Encode(machine.Response{Error: "malformed request: " + err.Error()})
		return
	}
	_ = json.NewEncoder(c).Encode(s.handle(req))
	if req.Op == machine.OpPowerOff {
		s.events <- nil
	}
}

func (s *supervisor) handle(req machine.Request) machine.Response {
	answer := make(chan machine.Response, 1)
	s.events <- func() {
		switch svc := s.find(req.Service); {
		case req.Op == machine.OpPowerOff:
			answer <- machine.Response{} // and then it is done, when the answer is on its way
		case req.Op == machine.OpStatus:
			answer <- machine.Response{Services: s.status()}
		case req.Op != machine.OpStart:
			answer <- machine.Response{Error: fmt.Sprintf("unknown operation %q", req.Op)}
		case svc == nil:
			answer <- machine.Response{Error: fmt.Sprintf("no service %q", req.Service)}
		default:
			svc.wanted = true
			svc.waiters = append(svc.waiters, answer)
			s.startWanted()
			svc.tellWaiters()
		}
	}
	return <-answer
}

func (s *supervisor) status() []machine.ServiceStatus {
	var all []machine.ServiceStatus
	for _, svc := range s.services {
		all = append(all, machine.ServiceStatus{
			Name: svc.Name, Pid: svc.pid, Ready: svc.ready, Restarts: svc.restarts, LastExit: svc.lastExit})
	}
	return all
}

// tellWaiters answers those who wait for the service, if it is ready.
func (svc *service) tellWaiters() {
	if !svc.ready {
		return
	}
	for _, w := range svc.waiters {
		w <- machine.Response{}
	}
	svc.waiters = nil
}

// powerOff ends every process of the machine: first a request, then by force.
func (s *supervisor) powerOff() error {
	for _, svc := range s.services {
		svc.wanted = false
	}
	_ = unix.Kill(-1, unix.SIGTERM) // every process but this one: kill(2)
	deadline := time.Now().Add(stopGrace)
	for killed := false; ; {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.ECHILD):
			unix.Sync()
			return nil
		case pid > 0:
		case !killed && time.Now().After(deadline):
			_ = unix.Kill(-1, unix.SIGKILL)
			killed = true
		default:
			time.Sleep(10 * time.Millisecond)
		}
	}
}
